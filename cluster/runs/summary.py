"""The results of a trained run: the exported model, its loss beside honest baselines, plots and samples."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.accounts.figures import Figures
from cluster.runs.console import Console
from cluster.runs.forecast import remember_speeds
from cluster.runs.recipe import Recipe
from cluster.runs.run import Run
from cluster.runs.run_events import FileWritten
from cluster.runs.sinks.ledger_sink import measured_speeds
from cluster.workloads.training_events import MetricsMeasured
from doge.common.config_tree import from_dict
from doge.common.storage import Storage
from doge.reporting.tracking import show_command, tracking_uri

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.order.packed_sequences import PackedSequences
    from data_pipelines.order.plan import Plan
    from doge.evaluation.ngrams import Baselines
    from doge.model.modeling import DogeForCausalLM
    from doge.training.state.run_position import RunPosition
    from doge.training.state.train_state import TrainState

_FILE = "summary.json"
_COUNTED_SEQUENCES = 50_000  # the most that baselines are counted on, evenly spread over those that the run saw
_CHUNK = 256
_PROMPTS = ("def main():", "The purpose of this", "Return the")


@dataclass(frozen=True)
class Summary:
    """Results of a trained run. Losses are in nats per token of the held-out set; None if nothing is held out.

    Args:
        held_out_bits_per_byte: the held-out loss for comparison with models of other tokenizers.
        missing: results that could not be made, or not yet; the same command makes them.
    """

    name: str
    step: int
    tokens_seen: int
    held_out_loss: float | None
    held_out_bits_per_byte: float | None
    unigram_loss: float | None
    bigram_loss: float | None
    baseline_tokens: int
    model: str
    plot: str
    samples: list[tuple[str, str]]
    show_command: str
    missing: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        console.say("")
        for prompt, text in self.samples:
            console.say(f"  {prompt!r} → {text!r}")
        console.say("")
        rows = [("trained", f"{self.step:,} steps, {self.tokens_seen:,} tokens")]
        if self.held_out_loss is not None:
            bits = self.held_out_bits_per_byte
            beside = "" if bits is None else f", {bits:.4f} bits a byte"
            rows.append(("held-out loss", f"{self.held_out_loss:.4f} nats a token{beside}"))
        if self.bigram_loss is not None:
            rows += [
                ("bigram model", f"{self.bigram_loss:.4f} (counted on {self.baseline_tokens:,} training tokens)"),
                ("unigram model", f"{self.unigram_loss:.4f}"),
            ]
        places = {"model": self.model, "loss curve": self.plot}
        rows += [(result, place) for result, place in places.items() if result not in self.missing]
        console.table([*rows, ("MLflow", self.show_command)])


def read_summary(recipe: Recipe, storage: Storage, directory: Storage) -> Summary | None:
    """The summary in a run's directory, with the places of today; None where there is none."""
    try:
        known = json.loads(directory.read_bytes(_FILE))
        return from_dict(Summary, known | _places(recipe, storage, directory), where=directory.path(_FILE))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _places(recipe: Recipe, storage: Storage, directory: Storage) -> dict[str, str]:
    """Where the results are; not kept, since a storage may be moved."""
    show = show_command(tracking_uri(recipe.tracking, storage))
    return {"model": directory.path("model"), "plot": directory.path("loss.png"), "show_command": show}


class Results:
    """What is made of the last checkpoint of a trained run, one by one, the model first.

    What fails takes nothing else with it: it is said, and missing from the summary. What an earlier call has made of
    the same checkpoint is kept.
    """

    def __init__(
        self, recipe: Recipe, plan: "Plan", storage: Storage, run: Run, checkpoint: "tuple[TrainState, RunPosition]"
    ):
        self._recipe, self._plan, self._storage, self._run = recipe, plan, storage, run
        self._state, self._position = checkpoint
        self._model: DogeForCausalLM | None = None
        self.figures: Figures | None = None
        self._makers = {
            "model": self._export,
            "samples": self._sample,
            "bits per byte": self._measure_bits,
            "baselines": self._measure_baselines,
            "loss curve": self._draw_losses,
            "timeline": self._account,
        }
        run.catch_up()
        known = read_summary(recipe, storage, run.directory)
        self.summary = known if known is not None and known.step == self._state.step else self._empty()

    def make(self) -> Summary:
        """Make what is missing, and return the summary."""
        for result in list(self.summary.missing):
            try:
                made = self._makers[result]()
                missing = [name for name in self.summary.missing if name != result]
                summary = replace(self.summary, **made, missing=missing)
                self._run.directory.write_bytes(_FILE, json.dumps(asdict(summary), indent=1).encode())
                self.summary = summary
            except Exception as error:  # of whatever kind: the other results do not need this one
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self._run.console.say(f"The run's {result} could not be made: {reason.removesuffix('.')}.")
        return self.summary

    def _empty(self) -> Summary:
        return Summary(
            name=self._recipe.name,
            step=self._state.step,
            tokens_seen=self._position.tokens_seen,
            held_out_loss=dict(self._run.curve("held_out_loss")).get(self._state.step),
            held_out_bits_per_byte=None,
            unigram_loss=None,
            bigram_loss=None,
            baseline_tokens=0,
            samples=[],
            missing=list(self._makers),
            **_places(self._recipe, self._storage, self._run.directory),
        )

    def _export(self) -> dict[str, Any]:
        from doge.conversion.export import export_model

        self._run.console.say("Exporting the model.")
        tokenizer = self._plan.open_tokenizer(self._storage)
        self._model = export_model(self._state, self._recipe.model.build(), tokenizer, self._run.directory, "model")
        return {}

    def _sample(self) -> dict[str, Any]:
        from doge.generation.samples import generate_samples

        tokenizer = self._plan.open_tokenizer(self._storage)
        model = self._model or _open_model(self._run.directory)
        samples = list(zip(_PROMPTS, generate_samples(model, tokenizer, _PROMPTS), strict=True))
        self._write("samples.txt", "\n\n".join(f"{prompt}{sample}" for prompt, sample in samples).encode())
        return {"samples": samples}

    def _measure_bits(self) -> dict[str, Any]:
        from doge.evaluation.bits_per_byte import bits_per_byte

        loss = self.summary.held_out_loss
        if loss is None:
            return {}
        bits = bits_per_byte(loss, *_held_out_text(self._recipe, self._plan, self._storage))
        self._run.post(MetricsMeasured(self._state.step, {"held_out_bits_per_byte": bits}))
        return {"held_out_bits_per_byte": bits}

    def _measure_baselines(self) -> dict[str, Any]:
        if self._recipe.data.held_out_sequences == 0:
            return {}
        self._run.console.say("Counting the baselines.")
        baselines = _baselines(self._recipe, self._plan, self._storage, self._position.next_unit)
        measured = {"unigram_loss": baselines.unigram, "bigram_loss": baselines.bigram}
        self._run.post(MetricsMeasured(self._state.step, measured))
        return measured | {"baseline_tokens": baselines.tokens}

    def _draw_losses(self) -> dict[str, Any]:
        from doge.reporting.plots import plot_losses

        known = {"unigram": self.summary.unigram_loss, "interpolated bigram": self.summary.bigram_loss}
        levels = {name: loss for name, loss in known.items() if loss is not None}
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder, "loss.png")
            curves = self._run.curve("loss"), self._run.curve("held_out_loss")
            plot_losses(plot, *curves, levels, self._recipe.name)
            self._write("loss.png", plot.read_bytes())
        return {}

    def _account(self) -> dict[str, Any]:
        self.figures = self._run.report(self._state.step)
        remember_speeds(self._recipe, self._storage, measured_speeds(self.figures))
        return {}

    def _write(self, name: str, content: bytes) -> None:
        self._run.directory.write_bytes(name, content)
        self._run.post(FileWritten(name))


def _open_model(directory: Storage) -> "DogeForCausalLM":
    """Open the exported model of a run."""
    from doge.conversion.load import load_model

    with tempfile.TemporaryDirectory() as folder:
        if not directory.is_local:
            for name in directory.names("model"):
                Path(folder, name).write_bytes(directory.read_bytes(f"model/{name}"))
        model = load_model(directory.path("model") if directory.is_local else folder)
    model.eval()
    return model


def _baselines(recipe: Recipe, plan: "Plan", storage: Storage, sequences: int) -> "Baselines":
    """Baselines counted on the first ``sequences`` of the run."""
    from data_pipelines.order.packed_sequences import PackedSequences
    from doge.evaluation.ngrams import measure_baselines

    held_out = recipe.data.held_out_sequences
    stride = max(1, -(-sequences // _COUNTED_SEQUENCES)) * _CHUNK
    training = _chunks(PackedSequences(storage, plan.fingerprint), range(0, sequences, stride))
    feed = PackedSequences(storage, plan.fingerprint, held_out=True)
    return measure_baselines(recipe.model.build().vocab_size, training, _chunks(feed, range(0, held_out, _CHUNK)))


def _held_out_text(recipe: Recipe, plan: "Plan", storage: Storage) -> tuple[int, int]:
    """The tokens that the held-out loss covers, and the bytes that they stand for."""
    from data_pipelines.order.packed_sequences import PackedSequences
    from doge.evaluation.bits_per_byte import count_text, token_bytes

    feed = PackedSequences(storage, plan.fingerprint, held_out=True)
    chunks = _chunks(feed, range(0, recipe.data.held_out_sequences, _CHUNK))
    return count_text((labels for _, labels in chunks), token_bytes(plan.open_tokenizer(storage)))


def _chunks(feed: "PackedSequences", starts: range) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """``(tokens, labels)`` of the sequences that follow each start."""
    for start in starts:
        chunk = feed.read(start, min(start + _CHUNK, starts.stop))
        yield chunk.tokens, chunk.labels
