"""What Ray Train, DeepSpeed and the run's own bookkeeping add to a training step.

    python benchmarks/ray_overhead.py --runs 3 --steps 12
    python benchmarks/ray_overhead.py --recipe tiny --steps 60

Trains Doge-20M, or a recipe's own model and batch, with one worker through the whole system, and the same sequences in
a plain PyTorch loop with the same optimizer, clipping and fp32 master weights, by turns: once alone on the machine, and
once beside a Ray that does nothing. On a CPU every process of Ray that wakes up takes a core from the step; the second
loop shows how much of the difference that is. Prints the median step of each and ends in one line of JSON with
step_s_ours, step_s_plain, step_s_beside_ray, ratio (ours to plain) and ratio_beside_ray (ours to the loop beside Ray).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict, read_yaml, to_yaml
from jobs.command import find_recipe

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        recipe: name of a recipe whose model, data and batch it has; None for Doge-20M, 2 x 2048.
    """

    recipe: str | None
    steps: int
    precision: Literal["bf16", "fp32"]

    def build(self, storage: str, name: str) -> Recipe:
        run = DOGE_20M if self.recipe is None else read_yaml(Recipe, find_recipe(self.recipe))
        training = replace(
            run.training, max_steps=self.steps, save_steps=10**6, eval_steps=10**6, micro_batch_size=self.rows(run)
        )
        return replace(
            run,
            name=name,
            storage=storage,
            data=replace(run.data, held_out_sequences=0, held_out_fraction=0.0),
            lr_scheduler=replace(run.lr_scheduler, warmup_steps=2, decay_steps=2),
            engine=replace(run.engine, precision=self.precision),
            training=training,
            scaling=replace(run.scaling, num_workers=1, warm_spares=0),
        )

    @staticmethod
    def rows(run: Recipe) -> int:
        """Sequences of a micro-batch: all, as far as they are no more tokens than one of 2,048."""
        return min(run.training.global_batch_size, max(1, 2048 // run.data.sequence_length))

    @property
    def options(self) -> list[str]:
        chosen = [] if self.recipe is None else ["--recipe", self.recipe]
        return [*chosen, "--steps", str(self.steps), "--precision", self.precision]


DOGE_20M = from_dict(
    Recipe,
    {
        "model": {"preset": "Doge-20M"},
        "tokenizer": {"vocab_size": 4096, "training_bytes": 2_000_000},
        "data": {"sequence_length": 2048},
        "training": {"global_batch_size": 2},
    },
)


def ours(storage: str, name: str, task: Task) -> list[float]:
    """Seconds of every step of a run of the whole system, with what lies between two steps."""
    path = Path(storage, f"{name}.yaml")
    run = task.build(storage, name)
    path.write_text(to_yaml(run))
    subprocess.run([sys.executable, "jobs/pretrain.py", "--recipe", path], check=True, capture_output=True)
    from doge.common.storage import Storage
    from doge.reporting.tracking import Tracker, TrackingRecipe

    root = Storage(storage)
    rates = Tracker(TrackingRecipe(), root, root / f"runs/{name}", name).history("tokens_per_s")
    return [run.training.global_batch_size * run.data.sequence_length / rate for _, rate in rates]


def plain(storage: str, name: str, task: Task) -> list[float]:
    """The same in a plain loop, in a process of its own."""
    command = [sys.executable, __file__, "--plain", storage, name, *task.options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def beside_ray(storage: str, name: str, task: Task) -> list[float]:
    """The plain loop on a machine with a Ray of its own, as a run starts it, without a task or an actor."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return plain(storage, name, task)
    finally:
        ray.shutdown()


def plain_loop(storage: str, name: str, task: Task) -> list[float]:
    """Seconds of every step of a loop that knows neither Ray nor DeepSpeed."""
    import torch

    from data_pipelines.order.packed_sequences import PackedSequences
    from data_pipelines.order.plan import make_plan
    from doge.common.hardware import use_cores
    from doge.common.storage import Storage
    from doge.model.modeling import build_model

    use_cores(1)
    run = task.build(storage, name)
    batch_size, rows = run.training.global_batch_size, task.rows(run)
    root = Storage(storage)
    reader = PackedSequences(root, make_plan(run.data, run.tokenizer, root).fingerprint)
    torch.manual_seed(run.training.seed)
    master = build_model(run.model.build())
    optimizer = run.optimizer.build(master)
    model = master if task.precision == "fp32" else deepcopy(master).to(torch.bfloat16)
    pairs = list(zip(model.parameters(), master.parameters(), strict=True))
    seconds = []
    for step in range(task.steps):
        batch = reader.read(batch_size * step, batch_size * (step + 1))
        started = time.perf_counter()
        loss_tokens = int((batch.labels[:, 1:] != -100).sum())
        for row in range(0, batch_size, rows):
            inputs = {
                "input_ids": torch.from_numpy(batch.tokens[row : row + rows]),
                "labels": torch.from_numpy(batch.labels[row : row + rows]),
                "position_ids": torch.from_numpy(batch.position_ids[row : row + rows]),
            }
            loss = model(**inputs, use_cache=False, reduction="sum").loss / loss_tokens
            loss.backward()
            if model is not master:  # gradients accumulate in fp32
                for weight, parameter in pairs:
                    gradient = weight.grad.float()
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                    weight.grad = None
        torch.nn.utils.clip_grad_norm_(master.parameters(), run.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * run.lr_scheduler.factor(step, task.steps)
        optimizer.step()
        optimizer.zero_grad()
        if model is not master:
            with torch.no_grad():
                for weight, parameter in pairs:
                    weight.copy_(parameter)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each, by turns")
    parser.add_argument("--steps", type=int, default=12, help=f"steps a run, of which {WARM_UP_STEPS} do not count")
    parser.add_argument("--recipe", help="name of a recipe; by default Doge-20M, 2 x 2048")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--plain", nargs=2, metavar=("STORAGE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    task = Task(arguments.recipe, arguments.steps, arguments.precision)
    if arguments.plain:
        storage, name = arguments.plain
        print(json.dumps(plain_loop(storage, name, task)))
        return
    measured = {"ours": ours, "plain": plain, "beside Ray": beside_ray}
    medians: dict[str, list[float]] = {label: [] for label in measured}
    with tempfile.TemporaryDirectory() as storage:
        for run in range(arguments.runs):
            for label, measure in measured.items():
                seconds = measure(storage, f"run-{run}", task)[WARM_UP_STEPS:]
                medians[label].append(statistics.median(seconds))
                print(f"{label:10} run {run + 1}: median step {medians[label][-1]:.3f} s", flush=True)
    step = {label: statistics.median(medians[label]) for label in measured}
    figures = {f"step_s_{label.lower().replace(' ', '_')}": seconds for label, seconds in step.items()}
    ratios = {"ratio": step["ours"] / step["plain"], "ratio_beside_ray": step["ours"] / step["beside Ray"]}
    print(json.dumps(figures | ratios))


if __name__ == "__main__":
    main()
