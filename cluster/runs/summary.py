"""What a finished run leaves behind: the exported model, its loss beside honest baselines, a plot and samples."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.runs.console import Console
from cluster.runs.recipe import Recipe
from doge.common.storage import Storage
from doge.reporting.tracking import Tracker

if TYPE_CHECKING:
    from data_pipelines.order.plan import Plan

# The baselines are counted on at most so many sequences, evenly spread over those that the run saw.
_COUNTED_SEQUENCES = 50_000
_CHUNK = 256
_PROMPTS = ("def main():", "The purpose of this", "Return the")


@dataclass(frozen=True)
class Summary:
    """Losses are mean nats a token over the held-out set; None where the recipe holds nothing out."""

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


def summarise(
    recipe: Recipe, plan: "Plan", storage: Storage, directory: Storage, tracker: Tracker, console: Console
) -> Summary:
    """Export the last checkpoint of a run that has ended, measure the baselines, draw, sample, and log all of it."""
    from doge.conversion.export import export_model
    from doge.generation.samples import generate_samples
    from doge.reporting.plots import plot_losses
    from doge.training.state.checkpoint import Checkpoints

    console.say("Exporting the model and counting the baselines.")
    state, position = Checkpoints(directory / "checkpoints").latest()
    tokenizer = plan.open_tokenizer(storage)
    model = export_model(state, recipe.model.build(), tokenizer, directory, "model")
    samples = list(zip(_PROMPTS, generate_samples(model, tokenizer, _PROMPTS), strict=True))
    losses = tracker.history("held_out_loss")
    unigram, bigram, counted = _baselines(recipe, plan, storage, position.next_unit)
    summary = Summary(
        name=recipe.name,
        step=state.step,
        tokens_seen=position.tokens_seen,
        held_out_loss=dict(losses).get(state.step),
        unigram_loss=unigram,
        bigram_loss=bigram,
        baseline_tokens=counted,
        model=directory.path("model"),
        plot=directory.path("loss.png"),
        samples=samples,
        show_command=tracker.show_command,
    )
    baselines = {"unigram": unigram, "interpolated bigram": bigram} if losses else {}
    with tempfile.TemporaryDirectory() as folder:
        plot, text = Path(folder, "loss.png"), Path(folder, "samples.txt")
        plot_losses(plot, tracker.history("loss"), losses, baselines, recipe.name)
        text.write_text("\n\n".join(f"{prompt}{sample}" for prompt, sample in samples))
        directory.write_bytes("loss.png", plot.read_bytes())
        tracker.log_artifact(plot)
        tracker.log_artifact(text)
    if losses:
        tracker.log_metrics([{"step": state.step, "unigram_loss": unigram, "bigram_loss": bigram}])
    directory.write_bytes("summary.json", json.dumps(asdict(summary), indent=1).encode())
    return summary


def _baselines(
    recipe: Recipe, plan: "Plan", storage: Storage, sequences: int
) -> tuple[float | None, float | None, int]:
    """Held-out losses of the unigram and bigram models, and the tokens that they were counted on."""
    from data_pipelines.order.packed_sequences import PackedSequences
    from doge.evaluation.ngrams import NgramBaselines

    held_out = recipe.data.held_out_sequences
    if held_out == 0:
        return None, None, 0
    training = PackedSequences(storage, plan.fingerprint)
    feed = PackedSequences(storage, plan.fingerprint, held_out=True)
    ngrams = NgramBaselines(recipe.model.build().vocab_size)
    stride = max(1, -(-sequences // _COUNTED_SEQUENCES)) * _CHUNK
    for start in range(0, sequences, stride):
        batch = training.read(start, min(start + _CHUNK, sequences))
        ngrams.count(batch.tokens, batch.labels)
    chunks = (feed.read(at, min(at + _CHUNK, held_out)) for at in range(0, held_out, _CHUNK))
    unigram, bigram = ngrams.losses((chunk.tokens, chunk.labels) for chunk in chunks)
    return unigram, bigram, ngrams.tokens
