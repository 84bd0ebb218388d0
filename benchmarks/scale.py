"""What coordinator, driver and ledger cost a step as a run grows, against simulated hosts in simulated time.

    python benchmarks/scale.py

64 workers on 16 nodes, then 1,000 on 500, make 2,000 steps of a second; a host is killed every 30 s and replaced. The
coordinator's judgement (`decide`) is the real one and gets every beat, twice a second from every host; the driver's
journal takes what every host tells of every step, as lines on this disk, and the ledger takes the same. Milliseconds
are those of this process's clock, divided by the steps. The growth of the memory is the pickled size of what the
coordinator and the ledger know at the end, over that in the middle. The last line is one JSON object with
ms_per_step_64, ms_per_step_1000, their parts, ratio (of the two, per worker) and memory_growth (the larger one).
"""

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/unit"), str(ROOT)]

import simulated_hosts  # type: ignore[import-not-found] # noqa: E402
from simulated_training import TrainingSimulation  # type: ignore[import-not-found] # noqa: E402

from cluster.accounts.ledger import DriverStarted, Ledger, StepRecord  # noqa: E402
from cluster.runs.journal import Journal  # noqa: E402

KILL_SECONDS = 30.0
TOKENS = 2048


class Scale(TrainingSimulation):
    """A run with a clock on every part of it that is real.

    Args:
        names: of the nodes, with as many entries as seats.
    """

    def __init__(self, names: list[str], steps: int, folder: str):
        self.names, self.seconds = names, dict.fromkeys(("coordinator", "journal", "ledger"), 0.0)
        self.ledger, self.journal = Ledger(TOKENS * len(names), TOKENS), Journal(Path(folder))
        self.told, self.sizes, self.replacements = 0, dict[int, int](), count()
        self.ledger.take(DriverStarted(100.0))
        super().__init__("", steps, save_steps=100, max_failures=-1, warm_spares=0, start_s=5.0)
        self.sit(names)  # a list of names in place of a string of letters
        self.later(60.0, self._kill)

    def _kill(self) -> None:
        if not self.finished:
            members = self.members()
            self.kill(members[next(self.replacements) * 7 % len(members)])
            self.later(KILL_SECONDS, self._kill)

    def _make_step(self, group: Any) -> None:
        before = group.step
        super()._make_step(group)
        if group.step == before:
            return
        records = [
            StepRecord(host.name, host.node, "CPU", group.membership.number, group.step, self.now, {"step": 0.9}, 1)
            for host in group.here.values()
        ]
        events, self.told = [*self.events[self.told :], *records], len(self.events)
        self._timed("journal", lambda: self.journal.append(events))
        for event in events:
            self._timed("ledger", partial(self.ledger.take, event))
        self.journal.trim(self.journal.end)  # all sinks have got it
        if group.step in (self.steps // 2, self.steps):
            self.sizes[group.step] = len(pickle.dumps(self.known)) + len(json.dumps(self.ledger.to_dict()))

    def _timed(self, part: str, act: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = act()
        self.seconds[part] += time.perf_counter() - began
        return result

    def measure(self) -> dict[str, float]:
        """Milliseconds a step by part, and how much the memory grew in the second half."""
        decide = simulated_hosts.decide
        simulated_hosts.decide = lambda *arguments: self._timed("coordinator", lambda: decide(*arguments))
        self.done = _Forgetful()
        try:
            self.until(lambda: self.finished, 50 * self.steps)
        finally:
            simulated_hosts.decide = decide
        if self.reason is not None:
            raise RuntimeError(self.reason)
        parts = {part: 1000 * seconds / self.steps for part, seconds in self.seconds.items()}
        return parts | {"growth": self.sizes[self.steps] / self.sizes[self.steps // 2]}


class _Forgetful(list[Any]):
    """The simulation's list of commands, of which nobody reads any here."""

    def append(self, _: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1000], help="workers")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    print(f"{'workers':>8} {'nodes':>6} {'coordinator':>12} {'journal':>8} {'ledger':>8}   ms a step   memory's growth")
    for workers in options.sizes:
        per_node = 4 if workers <= 64 else 2
        names = [f"node-{at // per_node}" for at in range(workers)]
        with tempfile.TemporaryDirectory() as folder:
            found = Scale(names, options.steps, folder).measure()
        parts = [found[part] for part in ("coordinator", "journal", "ledger")]
        growth = found["growth"]
        print(f"{workers:8} {workers // per_node:6} {parts[0]:12.2f} {parts[1]:8.2f} {parts[2]:8.2f} {growth:26.3f}")
        figures |= {f"{part}_ms_{workers}": found[part] for part in ("coordinator", "journal", "ledger")}
        figures[f"ms_per_step_{workers}"] = sum(parts)
        figures["memory_growth"] = max(figures.get("memory_growth", 0.0), growth)
    small, large = options.sizes[0], options.sizes[-1]
    figures["ratio"] = figures[f"ms_per_step_{large}"] / large / (figures[f"ms_per_step_{small}"] / small)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
