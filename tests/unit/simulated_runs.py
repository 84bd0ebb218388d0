"""Runs that are made up: the same workers with and without kills, told to a ledger and watched from outside."""

import random
from dataclasses import dataclass, field

from cluster.accounts.ledger import DriverStarted, Ledger, StepRecord, WorkEnded
from cluster.elastic.events import HostJoined, HostLeft, HostStarted, HostStarting, MembershipFormed

SEQUENCES, SEQUENCE_LENGTH = 64, 128
TOKENS_PER_STEP = SEQUENCES * SEQUENCE_LENGTH
CLOCK = 5_000.0  # what the driver's monotonic clock says when the run begins


@dataclass
class SimulatedRun:
    """Workers of given speeds that are killed every ``kill_seconds``, go on as a smaller group, and are replaced.

    Args:
        speeds: sequences a second of every worker.
        kill_seconds: the mean time between two kills; None kills nobody.
        save_steps: a new group goes on from the last multiple of this.
        spare_seconds: that a spare starts after the first step, and after each replacement, at the cost of the steps.
    """

    seed: int
    speeds: list[float]
    kill_seconds: float | None = None
    replace_seconds: float = 25.0
    restart_seconds: tuple[float, float] = (3.0, 12.0)
    save_steps: int = 20
    eval_steps: int = 30
    spare_seconds: float = 0.0
    ledger: Ledger = field(default_factory=lambda: Ledger(TOKENS_PER_STEP, SEQUENCE_LENGTH))
    clock: float = CLOCK
    highest: int = 0  # the last step that was ever finished: all that an observer outside knows
    killed_at: float | None = None  # the last kill, in seconds since the first step began

    def run(self, seconds: float) -> float:
        """Run until ``seconds`` after the first step began. Returns the tokens that count."""
        chance, ledger = random.Random(self.seed), self.ledger
        at, workers, names = self.clock, {}, iter(range(1000))
        ledger.take(DriverStarted(at))
        for slot in range(len(self.speeds)):
            workers[slot] = f"host-{next(names)}"
            ledger.take(HostJoined(workers[slot], f"node-{slot // 2}", at))
        missing: dict[int, float] = {}  # slot → when its new worker is there
        number, step, begun, kill, spare, spare_until = 1, self.highest, None, None, "", 0.0
        late: list[StepRecord] = []
        while True:
            # A new group: it goes on from the last commit.
            step = step - step % self.save_steps
            ledger.take(MembershipFormed(number, at, len(workers), step, self.highest, 0.0, None))
            at += chance.uniform(*self.restart_seconds)
            if self.spare_seconds and not spare and (begun is None or not missing):
                spare, spare_until = f"spare-{number}", at + self.spare_seconds
                ledger.take(HostStarting(spare, begun is not None, at))
            if begun is None:
                begun = at
            kill = kill or self._next_kill(chance, at)
            slow = 1.5  # the first step of a process
            while True:
                if at - begun >= seconds:
                    return self._finish(begun + seconds, late)
                seconds_of = self._step_seconds(chance, workers, step + 1, slow * (1.8 if at < spare_until else 1.0))
                took, slow = max(sum(each.values()) for each in seconds_of.values()), 1.0
                if kill < at + took and len(workers) > 1:
                    slot = chance.choice(sorted(workers)) if self.replace_seconds < seconds else min(workers)
                    self.killed_at = kill - begun
                    ledger.take(HostLeft(workers.pop(slot), kill + chance.uniform(0, 2)))
                    missing[slot] = kill + self.replace_seconds
                    at = kill + chance.uniform(1, 4)  # until it is noticed
                    kill = self._next_kill(chance, at)
                    break
                at, step = at + took, step + 1
                if spare and spare_until <= at:
                    ledger.take(HostStarted(spare, spare_until))
                    spare = ""
                if at - begun <= seconds:
                    self.highest = max(self.highest, step)
                    late += [self._record(slot, workers[slot], number, step, at, each)
                             for slot, each in seconds_of.items()]  # fmt: skip
                    if chance.random() < 0.3:  # posts come in batches, a worker's in order
                        self._deliver(late, chance)
                if ready := [slot for slot, when in missing.items() if when <= at]:
                    for slot in ready:
                        del missing[slot]
                        workers[slot] = f"host-{next(names)}"
                        ledger.take(HostJoined(workers[slot], f"node-{slot // 2}", at - self.replace_seconds / 3))
                    break
            number += 1

    def _device(self, slot: int) -> str:
        return f"GPU {self.speeds[slot]:g}"

    def _next_kill(self, chance: random.Random, at: float) -> float:
        return at + chance.uniform(0.6, 1.4) * self.kill_seconds if self.kill_seconds else float("inf")

    def _step_seconds(self, chance: random.Random, workers, step: int, slow: float) -> dict[int, dict[str, float]]:
        """Shares are fair, but everyone stumbles: what the slowest takes longer is the others' wait."""
        fair = SEQUENCES / sum(self.speeds[slot] for slot in workers)
        data = {slot: chance.random() * 0.5 if chance.random() < 0.05 else 0.001 for slot in workers}
        own = {slot: slow * fair * chance.uniform(0.9, 1.2) for slot in workers}
        together = max(data[slot] + own[slot] for slot in workers) + 0.05
        after = {}
        if step % self.eval_steps == 0:
            after["evaluation"] = 3 * fair
        if step % self.save_steps == 0:
            after["checkpoint"] = 0.4
        return {
            slot: {"data": data[slot], "step": own[slot], "others": together - data[slot] - own[slot]} | after
            for slot in workers
        }

    def _record(self, slot: int, host: str, number: int, step: int, at: float, seconds: dict[str, float]) -> StepRecord:
        share = SEQUENCES // len(self.speeds)
        return StepRecord(
            host, f"node-{slot // 2}", self._device(slot), number, step, at, seconds, share, energy_joules=10.0
        )

    def _deliver(self, late: list[StepRecord], chance: random.Random) -> None:
        order = {record.host: chance.random() for record in late}
        for record in sorted(late, key=lambda record: order[record.host]):
            self.ledger.take(record)
        late.clear()

    def _finish(self, at: float, late: list[StepRecord]) -> float:
        self._deliver(late, random.Random(0))
        self.ledger.take(WorkEnded(at))
        self.clock = at + 1e6  # another driver's clock has nothing to do with this one's
        return self.highest * TOKENS_PER_STEP
