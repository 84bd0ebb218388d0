"""The summary of a finished run: the exported model, its loss beside honest baselines, a plot and samples."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.runs.console import Console
from cluster.runs.recipe import Recipe
from cluster.runs.run import Run
from cluster.runs.run_events import FileWritten
from cluster.workloads.training_events import MetricsMeasured
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.reporting.tracking import show_command, tracking_uri

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.order.packed_sequences import PackedSequences
    from data_pipelines.order.plan import Plan
    from doge.evaluation.ngrams import Baselines

_COUNTED_SEQUENCES = 50_000  # the most that baselines are counted on, evenly spread over those that the run saw
_CHUNK = 256
_PROMPTS = ("def main():", "The purpose of this", "Return the")


@dataclass(frozen=True)
class Summary:
    """Results of a finished run. Losses are in nats per token of the held-out set; None if nothing is held out."""

    name: str
    step: int
    tokens_seen: int
    held_out_loss: float | None
    unigram_loss: float | None
    bigram_loss: float | None
    baseline_tokens: int
    model: str
    plot: str
    samples: list[tuple[str, str]]
    show_command: str

    def show(self, console: Console) -> None:
        console.say("")
        for prompt, text in self.samples:
            console.say(f"  {prompt!r} → {text!r}")
        console.say("")
        rows = [("trained", f"{self.step:,} steps, {self.tokens_seen:,} tokens")]
        if self.held_out_loss is not None:
            rows += [
                ("held-out loss", f"{self.held_out_loss:.4f} nats a token"),
                ("bigram model", f"{self.bigram_loss:.4f} (counted on {self.baseline_tokens:,} training tokens)"),
                ("unigram model", f"{self.unigram_loss:.4f}"),
            ]
        rows += [("model", self.model), ("loss curve", self.plot), ("MLflow", self.show_command)]
        console.table(rows)


def summarise(recipe: Recipe, plan: "Plan", storage: Storage, run: Run) -> Summary:
    """Export the last checkpoint of a run that has ended, measure the baselines, draw, sample, and record all of it."""
    from doge.conversion.export import export_model
    from doge.generation.samples import generate_samples
    from doge.reporting.plots import plot_losses
    from doge.training.state.checkpoint import Checkpoints

    run.console.say("Exporting the model and counting the baselines.")
    directory = run.directory
    found = Checkpoints(directory / "checkpoints").latest()
    if found is None:
        raise UserError(
            f"{directory.path('checkpoints')} holds no whole checkpoint any more: run the same command again."
        )
    state, position = found
    tokenizer = plan.open_tokenizer(storage)
    model = export_model(state, recipe.model.build(), tokenizer, directory, "model")
    samples = list(zip(_PROMPTS, generate_samples(model, tokenizer, _PROMPTS), strict=True))
    losses = run.curve("held_out_loss")
    baselines = _baselines(recipe, plan, storage, position.next_unit)
    summary = Summary(
        name=recipe.name,
        step=state.step,
        tokens_seen=position.tokens_seen,
        held_out_loss=dict(losses).get(state.step),
        unigram_loss=baselines.unigram if baselines else None,
        bigram_loss=baselines.bigram if baselines else None,
        baseline_tokens=baselines.tokens if baselines else 0,
        model=directory.path("model"),
        plot=directory.path("loss.png"),
        samples=samples,
        show_command=show_command(tracking_uri(recipe.tracking, storage)),
    )
    levels = {"unigram": baselines.unigram, "interpolated bigram": baselines.bigram} if baselines else {}
    with tempfile.TemporaryDirectory() as folder:
        plot = Path(folder, "loss.png")
        plot_losses(plot, run.curve("loss"), losses, levels, recipe.name)
        directory.write_bytes("loss.png", plot.read_bytes())
    text = "\n\n".join(f"{prompt}{sample}" for prompt, sample in samples)
    directory.write_bytes("samples.txt", text.encode())
    for name in ("loss.png", "samples.txt"):
        run.post(FileWritten(name))
    if baselines:
        measured = {"unigram_loss": baselines.unigram, "bigram_loss": baselines.bigram}
        run.post(MetricsMeasured(state.step, measured))
    directory.write_bytes("summary.json", json.dumps(asdict(summary), indent=1).encode())
    return summary


def _baselines(recipe: Recipe, plan: "Plan", storage: Storage, sequences: int) -> "Baselines | None":
    """Baselines counted on the first ``sequences`` of the run; None where the recipe holds nothing out."""
    from data_pipelines.order.packed_sequences import PackedSequences
    from doge.evaluation.ngrams import measure_baselines

    held_out = recipe.data.held_out_sequences
    if held_out == 0:
        return None
    stride = max(1, -(-sequences // _COUNTED_SEQUENCES)) * _CHUNK
    training = _chunks(PackedSequences(storage, plan.fingerprint), range(0, sequences, stride))
    feed = PackedSequences(storage, plan.fingerprint, held_out=True)
    return measure_baselines(recipe.model.build().vocab_size, training, _chunks(feed, range(0, held_out, _CHUNK)))


def _chunks(feed: "PackedSequences", starts: range) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """``(tokens, labels)`` of the sequences that follow each start."""
    for start in starts:
        chunk = feed.read(start, min(start + _CHUNK, starts.stop))
        yield chunk.tokens, chunk.labels
