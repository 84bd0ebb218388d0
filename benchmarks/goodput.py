"""Goodput of a training whose workers are killed again and again: by its own ledger, and by an outside clock.

    python benchmarks/goodput.py --minutes 10 --every 90

Two Ray nodes of one core each; about every 90 s `cluster.chaos` kills a worker that the seed chooses. A shorter
undisturbed twin of the same recipe trains before it and another after it. The outside clock is this process's: it sees
the driver tell of each step for the first time, and measures T from the end of the first step to the end of the last.
An undisturbed run of equal length is what the twins would have made in T: their beginning as it was, while the spares
start, and from then on their steady speed. The ledger's goodput knows nothing of the twins. The last line is one JSON
object.
"""

import argparse
import json
import random
import statistics
import threading
import time

from machines import Machines, Run, make_recipe, open_machines

SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE = 512, 16
BEGINNING = 30  # seconds of a twin in which its spares start
LAST_KILL_SECONDS = 30  # before the expected end


def recipe(storage: str, name: str, max_steps: int, save_steps: int):
    return make_recipe(
        name,
        storage,
        "seat",
        data={"sequence_length": SEQUENCE_LENGTH},
        training={
            "max_steps": max_steps,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": 8,
            "save_steps": save_steps,
        },
        scaling={"num_workers": 2},
    )


def commits(steps: float, save_steps: int) -> int:
    """About so many steps, such that the time from the first to the last holds the stalls of whole intervals."""
    return max(2, round(steps / save_steps)) * save_steps + 1


def train_twin(machines: Machines, name: str, max_steps: int, save_steps: int) -> Run:
    with machines.run(recipe(machines.storage, name, max_steps, save_steps)) as run:
        run.wait_for(max_steps, timeout=3600)
        run.finish()
    whole = run.seconds(1, max_steps)
    print(f"{name:10} {max_steps} steps, {(max_steps - 1) / whole:.3f} steps/s, loss {loss(run):.4f}", flush=True)
    return run


def loss(run: Run) -> float:
    """Of the last step: that a run which is fast did train."""
    return run.history("loss")[run.recipe.training.max_steps]


def beginning(run: Run) -> int:
    """The first step that ends after the spares' start."""
    late = (step for step, seen in sorted(run.seen.items()) if seen - run.seen[1] > BEGINNING)
    return next(late, max(2, run.recipe.training.max_steps // 3))


def possible_steps(twins: list[Run], seconds: float) -> float:
    """Steps after the first that the twins would have made in so many seconds: the mean of what each says."""
    made = []
    for run in twins:
        first, last = beginning(run), run.recipe.training.max_steps
        rate = (last - first) / run.seconds(first, last)
        made.append(first - 1 + (seconds - run.seconds(1, first)) * rate)
    return statistics.mean(made)


class Killer(threading.Thread):
    """Kills a worker about every ``every`` seconds until ``until`` seconds from now or the run's end."""

    def __init__(self, machines: Machines, run: Run, arguments: argparse.Namespace, until: float):
        super().__init__(daemon=True)
        self.machines, self.target, self.arguments, self.until = machines, run, arguments, until
        self.kills = 0

    def run(self) -> None:
        from cluster.chaos import Chaos, Nobody, RunOver
        from cluster.chaos.events import Event

        seed, every, start = self.arguments.seed, self.arguments.every, time.monotonic()
        chance = random.Random(seed)
        with Chaos(self.target.recipe.name, self.machines.address, seed) as chaos:
            number = 0
            while True:
                number += 1
                at = every * (number + chance.uniform(-0.2, 0.2))
                if at > self.until:
                    return
                try:
                    chaos.sleep(start + at)
                    done = chaos.act(Event(number, at, "kill-worker"), 1, 0.5, 1)
                except RunOver:
                    return
                except Nobody as reason:
                    print(f"           {at:6.1f} s  no kill: {reason}", flush=True)
                    continue
                self.kills += 1
                print(f"           {at:6.1f} s  {done}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the disturbed run, about (default: %(default)s)")
    parser.add_argument("--every", type=float, default=90, help="seconds between kills, ± 20 %% (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=15, help="between checkpoints (default: %(default)s)")
    parser.add_argument("--twin-steps", type=int, default=180, help="of each twin, about (default: %(default)s)")
    arguments = parser.parse_args()
    save_steps = arguments.save_steps
    twin_steps = commits(arguments.twin_steps, save_steps)
    with open_machines(2) as machines:
        print("preparing the data", flush=True)
        machines.prepare(recipe(machines.storage, "data", twin_steps, save_steps))
        twins = [train_twin(machines, "twin-1", twin_steps, save_steps)]
        seconds = 60 * arguments.minutes
        # A first guess at the goodput only sets the length.
        steps = commits(0.9 * possible_steps(twins, seconds), save_steps)
        machines.prepare(recipe(machines.storage, "data", steps, save_steps))
        print(f"disturbed  {steps} steps", flush=True)
        with machines.run(
            recipe(machines.storage, "disturbed", steps, save_steps),
            echo=lambda line: print(f"           {line}", flush=True),
        ) as run:
            killer = Killer(machines, run, arguments, seconds - LAST_KILL_SECONDS)
            killer.start()
            run.wait_for(steps, timeout=4 * seconds + 600)
            run.finish()
            killer.join()
        twins.append(train_twin(machines, "twin-2", twin_steps, save_steps))
        measured = run.seconds(1, steps)
        possible = possible_steps(twins, measured)
        twins_differ = possible_steps(twins[:1], measured) / possible_steps(twins[1:], measured) - 1
        figures = {
            name: run.history(f"ledger/{name}").get(steps)
            for name in ("goodput", "lost_steps", "restarts", "restart_seconds")
        }
        last_loss = loss(run)
    outside = (steps - 1) / possible
    tokens = GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
    print(
        f"\n{GLOBAL_BATCH_SIZE} × {SEQUENCE_LENGTH} tokens a step, a checkpoint every {save_steps} steps, two workers"
    )
    for label, text in (
        ("outside clock", f"{measured:,.1f} s from the end of step 1 to the end of step {steps:,}"),
        ("tokens", f"{(steps - 1) * tokens:,} that count, of {possible * tokens:,.0f} undisturbed"),
        ("the two twins", f"differ by {abs(twins_differ):.1%}"),
        ("kills", f"{killer.kills}, {figures['lost_steps']:,.0f} steps made again, last loss {last_loss:.4f}"),
        ("goodput", f"{figures['goodput']:.2%} by the ledger, {outside:.2%} by the outside clock"),
    ):
        print(f"  {label:14} {text}")
    result = {
        "goodput": round(figures["goodput"], 4),
        "goodput_outside": round(outside, 4),
        "difference_points": round(100 * (figures["goodput"] - outside), 2),
        "kills": killer.kills,
        "restarts": figures["restarts"],
        "lost_steps": figures["lost_steps"],
        "restart_seconds": figures["restart_seconds"],
        "seconds": round(measured, 1),
        "twins_differ": round(twins_differ, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
