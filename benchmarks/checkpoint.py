"""What checkpoints cost the step loop at the default interval, for Doge-20M, with one worker and with two.

    python benchmarks/checkpoint.py --commits 3

Measured directly: runs of `training.save_steps`' default, a core a worker, with a tiny batch, so that a step takes a
few tenths of a second. A real step takes longer (524,288 tokens: 6 s on an RTX 4090), and a longer step makes the share
smaller, since the state and its stall stay the same. The stall is the ledger's "checkpoint" time over all of the
loop's time from the end of the first step. Beside it stands what writing in the background adds to the steps
meanwhile, and how long a commit takes to be durable: stall, then from the first sight of the unfinished directory to
that of the finished one, looked for every 10 ms. `--save-steps` measures at a shorter interval and computes the
default's share from the stall and the step. The last line is one JSON object.
"""

import argparse
import json
import statistics
import threading
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from machines import Machines, make_recipe, open_machines

LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Costs:
    """Seconds; see the top.

    Args:
        step: the median of those beside which nothing is written.
        stall: of one commit, the mean.
        added: by one write to the steps beside it, the median.
        durable: from a commit's begin until it is safe, the median.
        loop: the whole, from the end of the first step.
        stalled: in it.
        commits: in it.
    """

    step: float
    stall: float
    added: float
    durable: float
    loop: float
    stalled: float
    commits: int

    def share(self, save_steps: int, seconds: float) -> float:
        """Of the loop's time at this interval, where one checkpoint costs so many seconds."""
        return seconds / (save_steps * self.step + seconds)


class Watch(threading.Thread):
    """Sees a run's checkpoint directories appear, unfinished and finished."""

    def __init__(self, directory: Path):
        super().__init__(daemon=True)
        self.directory, self.over = directory, threading.Event()
        self.begun: dict[int, float] = {}
        self.done: dict[int, float] = {}

    def run(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
            for name in names:
                unfinished = name.startswith(".")
                step = int(name.lstrip(".").split(".")[0].removeprefix("step-"))
                (self.begun if unfinished else self.done).setdefault(step, time.monotonic())

    @property
    def seconds(self) -> dict[int, float]:
        """That each write took."""
        return {step: done - self.begun[step] for step, done in self.done.items() if step in self.begun}


def recipe(arguments: argparse.Namespace, storage: str, name: str, workers: int):
    return make_recipe(
        name,
        storage,
        "seat",
        model={"preset": arguments.preset},
        data={"sequence_length": arguments.sequence_length},
        optimizer={"lr": 1e-3},
        training={
            "max_steps": arguments.save_steps * arguments.commits,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "save_steps": arguments.save_steps,
        },
        scaling={"num_workers": workers, "warm_spares": 0},
    )


def measure(machines: Machines, arguments: argparse.Namespace, workers: int) -> Costs:
    plan = recipe(arguments, machines.storage, f"{workers}-workers", workers)
    watch = Watch(Path(plan.storage, "runs", plan.name, "checkpoints"))
    watch.start()
    with machines.run(plan) as run:
        run.wait_for(plan.training.max_steps, timeout=7200)
        run.finish()
    watch.over.set()
    watch.join()
    tokens = plan.training.global_batch_size * plan.data.sequence_length
    steps = {step: tokens / rate for step, rate in run.history("tokens_per_s").items()}
    beside = {step: _beside(step, seconds, steps) for step, seconds in watch.seconds.items()}
    written = {step for those in beside.values() for step in those}
    quiet = statistics.median(took for step, took in steps.items() if step > 1 and step not in written)
    added = [sum(steps[step] - quiet for step in those) for those in beside.values() if those]
    (member,) = run.ledger()["memberships"]
    stalled, number = member["stall_seconds"]["checkpoint"], member["stall_counts"]["checkpoint"]
    durable = statistics.median(watch.seconds.values()) + stalled / number
    loop = member["last_end"] - member["first_end"] + member["stalls_since"]
    return Costs(quiet, stalled / number, statistics.median(added or [0.0]), durable, loop, stalled, number)


def _beside(commit: int, seconds: float, steps: dict[int, float]) -> list[int]:
    """The steps after a commit that began while it was being written."""
    later = [step for step in sorted(steps) if step > commit]
    begins = accumulate((steps[step] for step in later), initial=0.0)
    return [step for step, begin in zip(later, begins, strict=False) if begin < seconds]


def main() -> None:
    from cluster.runs.recipe import TrainingRecipe

    default = TrainingRecipe().save_steps
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="Doge-20M", help="(default: %(default)s)")
    parser.add_argument("--commits", type=int, default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=default, help="the recipe's default: %(default)s")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens, two a step (default: %(default)s)")
    arguments = parser.parse_args()
    found: dict[int, Costs] = {}
    with open_machines(2) as machines:
        print("preparing the data", flush=True)
        machines.prepare(recipe(arguments, machines.storage, "data", 1))
        for workers in (1, 2):
            found[workers] = costs = measure(machines, arguments, workers)
            print(f"{workers} worker(s): {costs.commits} commits in {costs.loop:.1f} s", flush=True)
    print(f"\n{arguments.preset}, 2 × {arguments.sequence_length} tokens a step, every {arguments.save_steps} steps")
    print(f"{'workers':8}{'step, s':>9}{'stall, s':>10}{'added, s':>10}{'durable, s':>12}{'stalled':>10}")
    shares = {}
    for workers, costs in found.items():
        measured = costs.stalled / costs.loop
        shares[workers] = measured if arguments.save_steps == default else costs.share(default, costs.stall)
        print(
            f"{workers:<8}{costs.step:>9.3f}{costs.stall:>10.3f}{costs.added:>10.3f}{costs.durable:>12.2f}"
            f"{measured:>10.2%}"
        )
    how = "measured" if arguments.save_steps == default else f"computed from stalls every {arguments.save_steps} steps"
    print(f"At the default of {default} steps ({how}): {', '.join(f'{share:.2%}' for share in shares.values())}")
    result = {"checkpoint_stall": round(max(shares.values()), 5), "how": how}
    for workers, costs in found.items():
        result |= {
            f"checkpoint_stall_{workers}": round(shares[workers], 5),
            f"checkpoint_cost_{workers}": round(costs.share(default, costs.stall + max(0.0, costs.added)), 5),
            f"stall_s_{workers}": round(costs.stall, 4),
            f"added_s_{workers}": round(costs.added, 4),
            f"durable_s_{workers}": round(costs.durable, 3),
            f"step_s_{workers}": round(costs.step, 4),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
