"""How fast every worker is, from what its steps took, and when another plan of the shares pays: pure arithmetic.

Every rank runs this on the same numbers and must come to the same plan, so nothing here reads a clock, and only
operations that every machine rounds alike (+, -, ×, /, square root) are used.
"""

from collections import deque
from collections.abc import Sequence
from math import isfinite, sqrt
from statistics import fmean

from cluster.workloads.shares import Shares, plan_shares

WINDOW = 100
"""Steps that a worker's speed is taken from."""
PAUSES_IN = 20
"""Of so many steps, or of fewer, the slowest is taken for a pause that says nothing about the speed."""
SUDDEN = ((3, 1.25), (8, 1.05))
"""(steps, factor): so many in a row, all slower or all faster than every earlier one by the factor, are a new speed."""
NOISE = 0.3
"""Gain that one measurement must promise to be acted on, and n measurements with 1/√n of it. Times that scatter evenly
by ±10 % promised more once in 36,000 simulated steps of two to seven equal workers."""
STEPS_BETWEEN = 4
"""A plan is kept for so many steps at least."""
PROBE = 20
"""A worker without units gets one again when the others have worked so many times as long as it would take."""


class Pace:
    """Follows the workers' speeds and keeps the plan of the shares that fits them.

    A speed is units over seconds, summed over the last steps without the slowest of them, so that one pause or a
    warm-up changes nothing, while a worker that is halted and let go at short intervals is seen at its mean speed. A
    first measurement that is slower than was expected is believed halfway.

    Args:
        global_batch_size: units of a step.
        limits: the largest micro-batch of every worker, in units.
        equal_micro_batches: whether all workers need as many micro-batches (ZeRO 2 and 3).
        speeds: what is known before the first step, in units per second; None is taken for the mean of the known.
        min_gain: part of the step time that another plan must save.

    Raises:
        ValueError: a plan for these workers is not possible.
    """

    def __init__(
        self,
        global_batch_size: int,
        limits: Sequence[int],
        equal_micro_batches: bool,
        speeds: Sequence[float | None],
        min_gain: float = 0.03,
    ):
        self.global_batch_size, self.limits = global_batch_size, list(limits)
        self.equal_micro_batches, self.min_gain = equal_micro_batches, min_gain
        self._expected = list(speeds)
        self._samples: list[deque[tuple[float, float]]] = [deque(maxlen=WINDOW) for _ in speeds]  # (units, seconds)
        self._idle = [0.0] * len(speeds)  # seconds that the others worked since this one had a unit
        self._steps_kept = STEPS_BETWEEN
        self.shares: Shares = self._plan()

    @property
    def speeds(self) -> list[float]:
        """What every worker is believed to do, in units per second; all 1 where nothing is known yet."""
        own = [
            _speed(samples) if samples else expected
            for samples, expected in zip(self._samples, self._expected, strict=True)
        ]
        known = [speed for speed in own if speed is not None]
        mean = fmean(known) if known else 1.0
        speeds = [mean if speed is None else speed for speed in own]
        for rank, samples in enumerate(self._samples):
            expected = self._expected[rank]
            usual = mean if expected is None else expected
            if len(samples) == 1 and speeds[rank] < usual:
                speeds[rank] = sqrt(speeds[rank]) * sqrt(usual)
        return speeds

    def observe(
        self, seconds: Sequence[float], counts: Sequence[int] | None = None, work: Sequence[float] | None = None
    ) -> bool:
        """Take in the step just made; True if ``shares`` is another plan from now on.

        Args:
            seconds: that every worker computed, without waiting for others; 0 where it was not measured.
            counts: units of every worker in that step's plan, by default those of ``shares``. A step that was still
                made by an earlier plan is only remembered.
            work: what every worker computed, in units of usual cost; ``counts`` by default.

        Raises:
            ValueError: there is not a number for every worker.
        """
        counts = self.shares.counts if counts is None else tuple(counts)
        work = counts if work is None else work
        if not len(seconds) == len(counts) == len(work) == len(self._samples):
            raise ValueError(
                f"{len(self._samples)} workers made the step, but {len(seconds)} times and {len(counts)} counts came."
            )
        measured = [done > 0 and isfinite(took) and took > 0 for took, done in zip(seconds, work, strict=True)]
        step_seconds = max((took for took, valid in zip(seconds, measured, strict=True) if valid), default=0.0)
        for rank, samples in enumerate(self._samples):
            if measured[rank]:
                samples.append((work[rank], seconds[rank]))
                _forget_earlier_speed(samples)
            self._idle[rank] = 0.0 if work[rank] else self._idle[rank] + step_seconds
        if counts != self.shares.counts:
            return False
        self._steps_kept += 1
        return self._probe() or self._improve()

    def set_limit(self, rank: int, limit: int) -> None:
        """Change a worker's largest micro-batch, as after an out-of-memory, and plan anew at once.

        Raises:
            ValueError: the limit is below one unit.
        """
        before, self.limits[rank] = self.limits[rank], limit
        try:
            self.shares = self._plan()
        except ValueError:
            self.limits[rank] = before
            raise
        self._steps_kept = 0

    def _plan(self, speeds: Sequence[float] | None = None) -> Shares:
        return plan_shares(
            self.global_batch_size, self.speeds if speeds is None else speeds, self.limits, self.equal_micro_batches
        )

    def _improve(self) -> bool:
        measurements = [len(samples) for samples, count in zip(self._samples, self.shares.counts, strict=True) if count]
        fewest = min((number for number in measurements if number), default=0)
        if self._steps_kept < STEPS_BETWEEN or not fewest:
            return False
        speeds = self.speeds
        plan, before = self._plan(speeds), self.shares.seconds(speeds)
        if before - plan.seconds(speeds) <= before * max(self.min_gain, NOISE / sqrt(fewest)):
            return False
        self.shares, self._steps_kept = plan, 0
        return True

    def _probe(self) -> bool:
        """Give a unit to a worker that had none for long: without one it could never show a better speed."""
        speeds = self.speeds
        waited = [idle * speed for idle, speed in zip(self._idle, speeds, strict=True)]
        rank = waited.index(max(waited))
        if waited[rank] < PROBE:
            return False
        self._expected[rank], self._idle[rank] = speeds[rank], 0.0
        self._samples[rank].clear()
        while not (plan := self._plan(speeds)).counts[rank]:
            speeds[rank] *= 1.25
        self.shares, self._steps_kept = plan, STEPS_BETWEEN  # the next step may take the unit away again
        return True


def _speed(samples: Sequence[tuple[float, float]]) -> float:
    """Units per second without the pauses, which are the steps with the most seconds per unit."""
    pauses = 1 + (len(samples) - 1) // PAUSES_IN if len(samples) > 1 else 0
    kept = sorted(samples, key=_seconds_per_unit)[: len(samples) - pauses]
    return sum(count for count, _ in kept) / sum(seconds for _, seconds in kept)


def _forget_earlier_speed(samples: deque[tuple[float, float]]) -> None:
    """Drop what came before a sudden change, which is told from noise by its order: every step lies beyond."""
    paces = [_seconds_per_unit(sample) for sample in samples]
    for steps, factor in SUDDEN:
        earlier, last = sorted(paces[:-steps]), paces[-steps:]
        if len(earlier) < max(2, steps - 1):
            return
        if min(last) > factor * earlier[-2] or max(last) * factor < earlier[0]:  # earlier[-1] may be a pause
            while len(samples) > steps:
                samples.popleft()
            return


def _seconds_per_unit(sample: tuple[float, float]) -> float:
    count, seconds = sample
    return seconds / count
