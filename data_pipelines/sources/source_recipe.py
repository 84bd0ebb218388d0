"""The recipe of the data: its sources and how their text becomes numbered training sequences."""

from dataclasses import dataclass, field, fields

from data_pipelines.formats.base import Format, format_class, nearest, option_names
from data_pipelines.sources.embedded import SCHEME
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
    max_bytes: int = 1_000_000
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        held_out_sequences: sequences that are never trained on, shared out over the sources like training.
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
