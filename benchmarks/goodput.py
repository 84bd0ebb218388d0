"""Goodput of a training whose workers are killed again and again: by its own ledger, and by an outside clock.

    python benchmarks/goodput.py --minutes 10 --every 90

The disturbed run and its undisturbed twin, each on two Ray nodes of one core, train at the same time, and each has the
machine for a fifth of a second in turn: so the twin is measured over the very time of the disturbed run, and a machine
whose speed wanders is as fast for one as for the other. All minutes and seconds asked for are those of one run's own
turns, so that twice as many pass. About every 90 s `cluster.chaos` kills a worker of the disturbed run that the seed
chooses.

The outside clock is this process's: it sees the drivers tell of each step for the first time, and measures from the end
of a run's first step to the end of its last. Goodput by the outside clock is what the disturbed run made of what its
twin made in as long a time. The ledger's goodput knows nothing of the twin, but takes the run's own calm steps for the
undisturbed speed: ``speed_of_twins`` says how that compares with the twin's. Both read somewhat higher than on machines
of their own: the head, which leads the restarts, takes no turns. The last line is one JSON object.
"""

import argparse
import json
import random
import threading
import time
from bisect import bisect_right

from machines import Machines, Run, first_cores, make_recipe, open_machines
from turns import Turns

SIDES = ("disturbed", "undisturbed")
SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE = 512, 16
FASTEST = 5.0  # steps a second for which there is data, of one run's turns
LAST_KILL_SECONDS = 30  # before the end, of one run's turns
FAIR_SHARE = 0.01  # of their time by which the two may differ
MOST_IDLE = 0.1  # of the time that nobody has, while one is stopped and the other is not yet woken


def recipe(storage: str, name: str, max_steps: int, save_steps: int):
    return make_recipe(
        name,
        storage,
        name,
        data={"sequence_length": SEQUENCE_LENGTH},
        training={
            "max_steps": max_steps,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": 8,
            "save_steps": save_steps,
        },
        scaling={"num_workers": 2},
    )


def steps_after_first(run: Run, seconds: float) -> float:
    """Steps that a run made in the seconds after the end of its first, the one then under way in part."""
    steps = sorted(run.seen)
    times = [run.seen[step] - run.seen[steps[0]] for step in steps]
    place = bisect_right(times, seconds)
    before, after = times[place - 1], times[place]
    return steps[place - 1] - steps[0] + (seconds - before) / (after - before) * (steps[place] - steps[place - 1])


class Killer(threading.Thread):
    """Kills a worker about every ``every`` seconds until ``until`` seconds from now or the run's end."""

    def __init__(self, machines: Machines, run: Run, seed: int, every: float, until: float):
        super().__init__(daemon=True)
        self.machines, self.target, self.seed, self.every, self.until = machines, run, seed, every, until
        self.kills = 0

    def run(self) -> None:
        from cluster.chaos import Chaos, Nobody, RunOver
        from cluster.chaos.disturbances import Disturbance

        chance, start, number = random.Random(self.seed), time.monotonic(), 0
        with Chaos(self.target.recipe.name, self.machines.address, self.seed) as chaos:
            while True:
                number += 1
                at = self.every * (number + chance.uniform(-0.2, 0.2))
                if at > self.until:
                    return
                try:
                    chaos.sleep(start + at)
                    done = chaos.act(Disturbance(number, at, "kill-worker"), 1, 0.5, 1)
                except RunOver:
                    return
                except Nobody as reason:
                    print(f"           {at:6.1f} s  no kill: {reason}", flush=True)
                    continue
                self.kills += 1
                print(f"           {at:6.1f} s  {done}", flush=True)


def train_both(machines: Machines, arguments: argparse.Namespace, max_steps: int) -> tuple[list[Run], int, Turns]:
    """The runs after their end, the kills of the first, and how the time was shared."""
    plans = [recipe(machines.storage, side, max_steps, arguments.save_steps) for side in SIDES]
    seconds = 2 * 60 * arguments.minutes  # of both together, as all that follow

    def echo(line: str) -> None:
        print(f"           {line}", flush=True)

    with machines.launch(plans[0], echo) as disturbed, machines.launch(plans[1]) as undisturbed:
        runs = [disturbed, undisturbed]
        nodes = [machines.nodes[:2], machines.nodes[2:]]
        families = [
            [run.process.pid, *(node.process.pid for node in own)] for run, own in zip(runs, nodes, strict=True)
        ]
        with Turns(*families) as turns:
            for run in runs:
                run.begin()
            end = disturbed.seen[1] + seconds
            killer = Killer(machines, disturbed, arguments.seed, 2 * arguments.every, seconds - 2 * LAST_KILL_SECONDS)
            killer.start()
            for minutes_left in range(int(seconds // 60), -1, -1):
                time.sleep(max(0.0, end - 60 * minutes_left - time.monotonic()))
                told = ", ".join(f"{run.recipe.name} {max(run.seen):,} steps" for run in runs)
                print(f"{told}, {minutes_left} minutes left", flush=True)
            disturbed.wait_for(max(disturbed.seen) + 1)  # not amid steps that it makes again
            disturbed.interrupt()
            measured = disturbed.seconds(1, max(disturbed.seen))
            while undisturbed.seconds(1, max(undisturbed.seen)) <= measured:  # it may have begun later
                undisturbed.wait_for(max(undisturbed.seen) + 1)
            killer.join()
    return runs, killer.kills, turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the disturbed run (default: %(default)s)")
    parser.add_argument("--every", type=float, default=90, help="seconds between kills, ± 20 %% (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (default: %(default)s)")
    parser.add_argument("--save-steps", type=int, default=15, help="between checkpoints (default: %(default)s)")
    arguments = parser.parse_args()
    max_steps = int(FASTEST * 60 * arguments.minutes)
    with open_machines(0) as machines:
        from cluster.accounts.ledger import Ledger

        for side in SIDES:
            for core in first_cores(2):
                machines.add_node(core, side)
        print("preparing the data", flush=True)
        machines.prepare(recipe(machines.storage, SIDES[0], max_steps, arguments.save_steps))
        (disturbed, undisturbed), kills, turns = train_both(machines, arguments, max_steps)
        figures, twins = (Ledger.from_dict(run.ledger()).figures(run.recipe.ledger) for run in (disturbed, undisturbed))
        losses = [run.history("loss") for run in (disturbed, undisturbed)]
    last = max(disturbed.seen)
    steps, seconds = last - 1, disturbed.seconds(1, last)
    possible = steps_after_first(undisturbed, seconds)
    outside, share = steps / possible, turns.seconds[0] / sum(turns.seconds)
    common = min(last, max(undisturbed.seen))
    tokens = GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
    speeds = [own.undisturbed_tokens_per_s or 0.0 for own in (figures, twins)]
    lost = ", ".join(f"{cause} {part:.1%}" for cause, part in figures.lost.items())
    print(
        f"\n{GLOBAL_BATCH_SIZE} × {SEQUENCE_LENGTH} tokens a step, a checkpoint every {arguments.save_steps} steps, "
        "two workers"
    )
    for label, text in (
        ("outside clock", f"{seconds:,.1f} s from the end of step 1 to the end of step {last:,}"),
        ("turns", f"{share:.2%} of both runs' time was the disturbed one's, {turns.idle:.2%} of all nobody's"),
        ("tokens", f"{steps * tokens:,} that count, of {possible * tokens:,.0f} undisturbed"),
        ("kills", f"{kills}, {figures.lost_steps:,.0f} steps made again"),
        ("loss", f"{losses[0][common]:.4f} at step {common:,}, undisturbed {losses[1][common]:.4f}"),
        ("goodput", f"{figures.goodput:.2%} by the ledger, {outside:.2%} by the outside clock"),
        ("lost", f"{lost}, by the ledger"),
        ("speed", f"{speeds[0]:,.0f} tokens/s undisturbed by the ledger, {speeds[1]:,.0f} by the twin's ledger"),
    ):
        print(f"  {label:14} {text}")
    if abs(share - 0.5) > FAIR_SHARE or turns.idle > MOST_IDLE:
        raise SystemExit("The runs did not have the machine for as long as each other: leave it to this benchmark.")
    assert figures.goodput is not None
    result = {
        "goodput": round(figures.goodput, 4),
        "goodput_outside": round(outside, 4),
        "difference_points": round(100 * (figures.goodput - outside), 2),
        "speed_of_twins": round(speeds[0] / speeds[1], 4),
        "kills": kills,
        "restarts": figures.restarts,
        "lost_steps": figures.lost_steps,
        "restart_seconds_of_both": figures.restart_seconds,
        "seconds_of_both": round(seconds, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
