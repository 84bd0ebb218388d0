"""How near two unequal workers come to the sum of their own speeds, with measured and with equal shares.

    python benchmarks/unequal_workers.py --rounds 3

Two Ray nodes of one core each, on which Ray's own processes yield to the workers. The worker of the second is stopped
and continued from outside, a third of the time running, so that nothing in the training knows of it. Each round trains
four times by turns: both with shares that follow the measured speeds, both with equal shares, the first worker alone,
and the second alone, throttled as in the pair. Speeds are tokens over the time between the ends of two steps, seen from
outside; the steps before the throttle works and the first after it, in which the speeds are learned, do not count.
Efficiency is the pair's speed over the sum of the two alone. The last line is one JSON object of medians over the
rounds.
"""

import argparse
import json
import statistics
from contextlib import nullcontext
from dataclasses import dataclass

from machines import Machines, make_recipe, open_machines


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Args:
        label: what the table calls it.
        seats: that its workers take.
        workers: how many.
        shares: of the recipe.
        skipped: steps under the throttle that do not count.
        part: of ``--steps`` that it makes: the slower, the fewer, for windows of about equal length.
    """

    label: str
    seats: str
    workers: int
    shares: str
    skipped: int
    part: float

    def steps(self, steps: int) -> int:
        """That count."""
        return max(2, round(self.part * steps))

    def max_steps(self, steps: int) -> int:
        """More than are made: the run is ended once it is measured."""
        return UNTHROTTLED_STEPS + self.skipped + self.steps(steps)


UNTHROTTLED_STEPS = 12  # at most, while all else is made to yield
SETTINGS = [
    Setting("pair", "seat", 2, "measured", 12, 1.0),
    Setting("pair, equal", "seat", 2, "equal", 2, 0.3),
    Setting("fast alone", "seat-0", 1, "measured", 2, 0.7),
    Setting("slow alone", "seat-1", 1, "measured", 1, 0.35),
]


def recipe(arguments: argparse.Namespace, storage: str, setting: Setting, name: str, max_steps: int):
    return make_recipe(
        name,
        storage,
        setting.seats,
        data={"sequence_length": arguments.sequence_length},
        training={
            "max_steps": max_steps,
            "global_batch_size": arguments.global_batch_size,
            "micro_batch_size": 8,
            "save_steps": 10**6,
        },
        # A spare that imports would compute on the workers' cores.
        scaling={"num_workers": setting.workers, "shares": setting.shares, "warm_spares": 0},
    )


def measure(machines: Machines, arguments: argparse.Namespace, setting: Setting, name: str) -> tuple[float, float]:
    """Tokens per second of one training, and the share of the time that the throttled worker ran."""
    from cluster.chaos.throttle import throttle_process

    plan = recipe(arguments, machines.storage, setting, name, setting.max_steps(arguments.steps))
    with machines.run(plan) as run:
        machines.favor(run)
        slow = [member["pid"] for member in run.members() if member["node"] == machines.nodes[1].node_id]
        with throttle_process(slow[0], arguments.share, arguments.period) if slow else nullcontext() as throttle:
            first = max(run.seen) + 1 + setting.skipped  # the step under way began without
            last = first + setting.steps(arguments.steps)
            run.wait_for(last, timeout=3600)
    tokens = (last - first) * arguments.global_batch_size * arguments.sequence_length
    return tokens / run.seconds(first, last), throttle.achieved if throttle else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all four trainings (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of the pair that count (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1 / 3, help="of its time, for the slow one (default: a third)")
    parser.add_argument("--period", type=float, default=0.2, help="seconds between two stops (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=256, help="sequences (default: %(default)s)")
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {setting.label: [] for setting in SETTINGS}
    ran: list[float] = []
    with open_machines(2) as machines:
        print("preparing the data", flush=True)
        longest = max(setting.max_steps(arguments.steps) for setting in SETTINGS)
        machines.prepare(recipe(arguments, machines.storage, SETTINGS[0], "data", longest))
        for number in range(1, arguments.rounds + 1):
            for place, setting in enumerate(SETTINGS):
                speed, share = measure(machines, arguments, setting, f"round-{number}-{place}")
                speeds[setting.label].append(speed)
                ran += [share] if share < 1 else []
                print(
                    f"round {number}  {setting.label:12}{speed:>9,.0f} tokens/s  slow one ran {share:.3f}", flush=True
                )
    pair, equal, fast, slow = (speeds[setting.label] for setting in SETTINGS)
    sums = [a + b for a, b in zip(fast, slow, strict=True)]
    efficiency = [a / b for a, b in zip(pair, sums, strict=True)]
    equal_efficiency = [a / b for a, b in zip(equal, sums, strict=True)]
    tokens = arguments.global_batch_size * arguments.sequence_length
    print(f"\n{arguments.global_batch_size} × {arguments.sequence_length} tokens a step, one core a worker, medians")
    print(f"{'':14}{'tokens/s':>10}{'step, s':>10}{'of the sum':>12}")
    for label, values, shares in (
        ("pair", pair, efficiency), ("pair, equal", equal, equal_efficiency), ("fast alone", fast, None),
        ("slow alone", slow, None), ("their sum", sums, None),
    ):  # fmt: skip
        speed = statistics.median(values)
        part = f"{statistics.median(shares):>12.3f}" if shares else ""
        print(f"{label:14}{speed:>10,.0f}{tokens / speed if label != 'their sum' else 0:>10.2f}{part}")
    result = {
        "efficiency": round(statistics.median(efficiency), 4),
        "equal_split_efficiency": round(statistics.median(equal_efficiency), 4),
        "tokens_per_s_pair": round(statistics.median(pair), 1),
        "tokens_per_s_equal_split": round(statistics.median(equal), 1),
        "tokens_per_s_fast_alone": round(statistics.median(fast), 1),
        "tokens_per_s_slow_alone": round(statistics.median(slow), 1),
        "slow_share": round(statistics.median(ran), 4),
        "rounds": arguments.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
