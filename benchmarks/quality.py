"""Hours to the same held-out loss: the recipe fast/tiny against the published one, at two widths.

    python benchmarks/quality.py                       # all of it: about two hours on two CPU cores
    python benchmarks/quality.py --train fast/tiny 192 0   # one training alone: recipe, width, seed
    python benchmarks/quality.py --time                # the seconds of a step alone: on a quiet machine

Each recipe is trained from three seeds, in one process without Ray, and evaluated on the recipe's held-out sequences.
The target is the mean loss at the end of the published recipe. A training's minutes to it are its steps until then, by
a straight line between evaluations, times the median seconds of its step. Those are timed apart, in turns, so that
trainings may run beside other work.

What is done is kept in --results and not done again: move that file away to begin anew. At the end everything is drawn
beside it, and the last line is one JSON object. `minutes_ratio` is the larger of the two widths' ratios, null if a
training of fast/tiny does not reach the target.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PUBLISHED, FAST = "tiny", "fast/tiny"
SEEDS = (0, 1, 2)
EVAL_STEPS = 100
# Width 192 has half as many parameters again between embedding and output, and two heads.
WIDTHS: dict[int, dict[str, Any]] = {
    128: {},
    192: {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 2},
}


class Bench:
    """The data, made once below a home, and engines of recipes at any width."""

    def __init__(self, home: Path):
        import torch

        from data_pipelines.order.packed_sequences import PackedSequences
        from data_pipelines.order.plan import make_plan
        from data_pipelines.tokenizing.shards import read_record
        from doge.common.storage import Storage
        from doge.training import process_group
        from doge.training.deepspeed_internals import import_deepspeed

        self.device = torch.device("cpu")
        import_deepspeed(self.device)
        process_group.be_alone(self.device)
        storage, recipe = Storage(str(home)), self.recipe(PUBLISHED, 128)
        plan = make_plan(recipe.data, recipe.tokenizer, storage)
        tokenizer = plan.open_tokenizer(storage)
        for source, files in plan.files.items():
            for file in range(len(files)):
                for part in count():
                    record = read_record(storage, plan.keys[source][file], part)
                    record = record or plan.make_shard(storage, source, file, part, tokenizer)
                    if record is None or record.last:
                        break
        self.feed = PackedSequences(storage, plan.fingerprint)
        self.held_out = PackedSequences(storage, plan.fingerprint, held_out=True)

    def recipe(self, name: str, width: int) -> Any:
        from cluster.runs.recipe import Recipe
        from doge.common.config_tree import read_yaml
        from jobs.command import find_recipe

        recipe = read_yaml(Recipe, find_recipe(name))
        return replace(recipe, model=replace(recipe.model, **WIDTHS[width]))

    def engine(self, recipe: Any, seed: int) -> Any:
        from doge.training.communicator import Communicator
        from doge.training.engine import Engine
        from doge.training.next_token import NextTokenPrediction

        objective = NextTokenPrediction(recipe.model, seed, z_loss=recipe.training.z_loss)
        with redirect_stdout(None):  # DeepSpeed prints its memory
            return Engine(objective, recipe.optimizer, recipe.engine, self.device, replicas=Communicator(0, 1))

    def step(self, engine: Any, recipe: Any, step: int) -> float:
        """Make a step; its seconds."""
        size, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
        batch = engine.objective.prepare(engine.module, self.feed.read(step * size, (step + 1) * size), ())
        sizes = [min(micro, size - start) for start in range(0, size, micro)]
        began = time.perf_counter()
        engine.step(batch, sizes, recipe.lr_scheduler.factor(step, recipe.training.max_steps))
        return time.perf_counter() - began

    def train(self, name: str, width: int, seed: int) -> list[tuple[int, float]]:
        """(step, held-out loss) pairs, the last of the whole recipe."""
        recipe = self.recipe(name, width)
        engine, steps, curve = self.engine(recipe, seed), recipe.training.max_steps, []
        held_out = recipe.data.held_out_sequences
        for step in range(steps):
            self.step(engine, recipe, step)
            if (step + 1) % EVAL_STEPS == 0 or step + 1 == steps:
                batch = engine.objective.prepare(engine.module, self.held_out.read(0, held_out), ())
                loss, _ = engine.evaluate(batch[start : start + 8] for start in range(0, held_out, 8))
                curve.append((step + 1, round(loss, 4)))
                print(f"{name}, width {width}, seed {seed}: step {step + 1:,}  held-out loss {loss:.4f}", flush=True)
        engine.close()
        return curve

    def step_seconds(self, rounds: int) -> dict[str, float]:
        """Median seconds of a step of each recipe at each width, which take turns."""
        sides = {(name, width): self.recipe(name, width) for width in WIDTHS for name in (PUBLISHED, FAST)}
        engines = {side: self.engine(recipe, 0) for side, recipe in sides.items()}
        seconds: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
        for number in range(-3, rounds):  # those before 0 warm up
            for side in list(sides)[:: 1 if number % 2 else -1]:  # in both orders: a side inherits the caches
                taken = self.step(engines[side], sides[side], number + 3)
                if number >= 0:
                    seconds[side].append(taken)
        return {key(*side): round(statistics.median(taken), 4) for side, taken in seconds.items()}


def key(name: str, width: int) -> str:
    return f"{name} at width {width}"


def steps_to(curve: list[tuple[int, float]], target: float) -> float | None:
    """Steps until the held-out loss is at most the target, by a straight line between evaluations; None if never."""
    before = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def compare(curves: dict[str, dict[str, Any]], seconds: dict[str, float], tokens_per_step: int) -> dict[str, Any]:
    """Print a line for each recipe and width, and return the ratios."""
    ratios: dict[int, float | None] = {}
    print(f"\n{'':24}{'held-out loss, seeds':>30}{'ms a step':>12}{'tokens, M':>12}{'minutes':>10}")
    for width in WIDTHS:
        minutes: dict[str, float | None] = {}
        ends = [curve[-1][1] for curve in curves[key(PUBLISHED, width)].values()]
        target = statistics.mean(ends)
        for name in (PUBLISHED, FAST):
            side = key(name, width)
            whole = name == PUBLISHED  # it ends at the target by definition, as a mean over its seeds
            steps = [curve[-1][0] if whole else steps_to(curve, target) for curve in curves[side].values()]
            reached = [taken for taken in steps if taken is not None]
            mean = statistics.mean(reached) if len(reached) == len(steps) else None
            minutes[name] = None if mean is None else mean * seconds[side] / 60
            losses = " ".join(f"{curve[-1][1]:.3f}" for curve in curves[side].values())
            tokens = "never" if mean is None else f"{mean * tokens_per_step / 1e6:.2f}"
            told = "never" if mean is None else f"{minutes[name]:.2f}"
            print(f"{side:24}{losses:>30}{seconds[side] * 1e3:>12.0f}{tokens:>12}{told:>10}")
        fast, published = minutes[FAST], minutes[PUBLISHED]
        ratios[width] = None if fast is None or published is None else round(fast / published, 3)
    found = [ratio for ratio in ratios.values() if ratio is not None]
    worst = max(found) if len(found) == len(ratios) else None
    return {f"minutes_ratio_{width}": ratio for width, ratio in ratios.items()} | {"minutes_ratio": worst}


def draw(curves: dict[str, dict[str, Any]], seconds: dict[str, float], path: Path) -> None:
    """Held-out loss over minutes, a line for each training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(10, 4), sharey=True, layout="constrained")
    for plot, width in zip(axes, WIDTHS, strict=True):
        for name, color in ((PUBLISHED, "#c9a227"), (FAST, "#2a6f97")):
            for number, curve in enumerate(curves[key(name, width)].values()):
                minutes = [step * seconds[key(name, width)] / 60 for step, _ in curve]
                plot.plot(minutes, [loss for _, loss in curve], color=color, label=None if number else name)
        plot.axhline(
            statistics.mean(curve[-1][1] for curve in curves[key(PUBLISHED, width)].values()), color="gray", lw=0.8
        )
        plot.set(title=f"width {width}", xlabel="minutes of steps", ylim=(3.4, 6))
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(frameon=False)
    axes[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path.home() / "doge", help="for tokens (default: %(default)s)")
    results = ROOT / "docs" / "quality.json"
    parser.add_argument("--results", type=Path, default=results, help="what is done (default: docs/quality.json)")
    parser.add_argument("--train", nargs=3, metavar=("RECIPE", "WIDTH", "SEED"), help="make one training alone")
    parser.add_argument("--time", action="store_true", help="time the steps alone")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each side (default: %(default)s)")
    args = parser.parse_args()

    def done() -> dict[str, Any]:
        return json.loads(args.results.read_text()) if args.results.exists() else {"losses": {}, "step_seconds": {}}

    wanted = [(name, width, seed) for width in WIDTHS for name in (PUBLISHED, FAST) for seed in SEEDS]
    if args.train:
        wanted = [(args.train[0], int(args.train[1]), int(args.train[2]))]
    missing = [run for run in wanted if str(run[2]) not in done()["losses"].get(key(*run[:2]), {})]
    if args.time:
        missing = []
    bench = Bench(args.home)
    for name, width, seed in missing:
        curve, kept = bench.train(name, width, seed), done()  # another process may have added to it
        kept["losses"].setdefault(key(name, width), {})[str(seed)] = curve
        args.results.write_text(json.dumps(kept) + "\n")
    if not args.train and (args.time or not done()["step_seconds"]):
        seconds = bench.step_seconds(args.rounds)
        args.results.write_text(json.dumps(done() | {"step_seconds": seconds}) + "\n")
    if args.train or args.time:
        return
    kept, recipe = done(), bench.recipe(PUBLISHED, 128)
    tokens = recipe.training.global_batch_size * recipe.data.sequence_length
    found = compare(kept["losses"], kept["step_seconds"], tokens)
    draw(kept["losses"], kept["step_seconds"], args.results.with_suffix(".png"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
