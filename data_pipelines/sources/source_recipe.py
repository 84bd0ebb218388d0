"""The recipe of the data: its sources and how their text becomes numbered training sequences."""

from dataclasses import dataclass, field, fields
from typing import Literal

from data_pipelines.formats.base import Format, format_class, nearest, option_names
from data_pipelines.sources.embedded import GROUP_COLUMN, SCHEME
from doge.common.errors import UserError


@dataclass(frozen=True)
class SourceRecipe:
    """One source of the mixture.

    Args:
        path: place of the text: a file, a directory or a glob, local or as a URI: of anything fsspec opens, of the hub
            (``hf://datasets/OWNER/NAME@REVISION/*.parquet``), or ``python-installation://`` followed by ``prose``,
            ``conversation``, ``code`` or ``arithmetic``. Links are followed, and what exists is taken literally.
        weight: share of the training sequences, relative to the other sources' weights.
        format: how a row becomes a document: ``text`` takes ``text_column``; ``conversation`` makes ``prompt_column``
            and ``text_column`` the user's and the assistant's turn of the chat template; ``software-heritage`` fetches
            the file that ``blob_column`` names from ``blob_url``. Each module of data_pipelines/formats adds one.
        text_column: column with the text, or with the assistant's turn of a conversation.
        prompt_column: column with the user's turn of a conversation.
        blob_column: column with the Software Heritage id of a file.
        blob_url: directory with one gzipped file per Software Heritage id.
        group_column: column whose value tells which documents belong together, such as a repository or an article:
            they are held out together. By default each text is by itself (and a Python installation's go by module).
        max_bytes: size of a ``python-installation`` source: about how many bytes of text it holds.
        options: values of the format's options that have no key of their own here.
    """

    path: str
    weight: float
    format: str = "text"
    text_column: str = "text"
    prompt_column: str = "prompt"
    blob_column: str = "blob_id"
    blob_url: str = "https://softwareheritage.s3.amazonaws.com/content"
    group_column: str | None = None
    max_bytes: int = 1_000_000
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise UserError("A source's path is empty: give a file, a directory, a glob or a URI.")
        further = option_names(self.format) - _keys()
        for name in self.options:
            if name not in further:
                advice = f"the nearest is {nearest(name, further)}" if further else "its options are keys of the source"
                raise UserError(f"The format {self.format!r} has no option {name!r}; {advice}.")

    @property
    def reader(self) -> Format:
        """The source's format with its options."""
        own = {name: getattr(self, name) for name in option_names(self.format) & _keys()}
        return format_class(self.format)(**own, **self.options)

    @property
    def group(self) -> str | None:
        """The column whose value documents share that are held out together."""
        return GROUP_COLUMN if self.path.startswith(SCHEME) and self.group_column is None else self.group_column

    @property
    def columns(self) -> list[str]:
        """The columns of a row that are kept."""
        own = self.reader.columns
        return own if self.group is None or self.group in own else [*own, self.group]

    @property
    def reads(self) -> list[str]:
        """The columns and further options that the documents depend on, besides the file and the format's name."""
        return [*self.reader.columns, *(f"{name}={value}" for name, value in sorted(self.options.items()))]


def _keys() -> set[str]:
    return {key.name for key in fields(SourceRecipe)}


def _python_installation() -> dict[str, SourceRecipe]:
    return {
        "prose": SourceRecipe(SCHEME + "prose", 0.7, max_bytes=7_000_000),
        "conversation": SourceRecipe(SCHEME + "conversation", 0.2, "conversation", max_bytes=2_000_000),
        "code": SourceRecipe(SCHEME + "code", 0.05, max_bytes=500_000),
        "arithmetic": SourceRecipe(SCHEME + "arithmetic", 0.05, max_bytes=500_000),
    }


@dataclass(frozen=True)
class DataRecipe:
    """Text to numbered training sequences.

    Args:
        sources: sources of the mixture by name. Default: the Python installation itself, which needs no download.
        sequence_length: tokens of a training sequence.
        seed: seed of the order of the sequences.
        held_out_sequences: sequences that a model is evaluated on, shared out over the sources like training; 0 holds
            nothing out.
        held_out_fraction: part of all documents that is never trained on, from which those sequences come.
        packing: how documents become sequences. ``best_fit`` cuts only those that are longer than a sequence, and each
            piece begins with BOS; ``stream`` cuts wherever a sequence ends, and fills all of it.
        documents_per_shard: documents that one task tokenizes and one shard holds.
        files_per_stripe: files of a source whose sequences are mixed with one another; training on a source starts
            when the first shard of each is prepared.
        skip_unreadable: leave out files and rows that cannot be read, with a warning, instead of stopping.
        num_cpus_per_task: CPUs that Ray reserves for a preparing task. Default: none, so that preparing goes on beside
            training workers that have reserved every CPU.
        max_tasks: shards prepared at the same time; 0 for as many as the cluster has CPUs.
    """

    sources: dict[str, SourceRecipe] = field(default_factory=_python_installation)
    sequence_length: int = 2048
    seed: int = 233
    held_out_sequences: int = 1000
    held_out_fraction: float = 0.01
    packing: Literal["best_fit", "stream"] = "best_fit"
    documents_per_shard: int = 4096
    files_per_stripe: int = 8
    skip_unreadable: bool = False
    num_cpus_per_task: float = 0.0
    max_tasks: int = 0

    def __post_init__(self) -> None:
        smallest = {
            "sequence_length": 2,
            "held_out_sequences": 0,
            "documents_per_shard": 1,
            "files_per_stripe": 1,
            "num_cpus_per_task": 0,
            "max_tasks": 0,
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise UserError(f"data.{name} must be at least {least}, not {getattr(self, name)}.")
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"data.held_out_fraction must be at least 0 and below 1, not {self.held_out_fraction}.")
        if self.held_out_sequences and not self.held_out_fraction:
            raise UserError(
                "data.held_out_fraction is 0, but data.held_out_sequences is not: set both to 0 to hold nothing out."
            )

    @property
    def holds_out(self) -> float:
        """The part of all documents that is held out."""
        return self.held_out_fraction if self.held_out_sequences else 0.0
