"""What the ledger keeps of one membership: the times of its steps and stalls, by the records of one of its hosts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_STALLS = {"checkpoint", "evaluation"}

DeviceGroup = tuple[tuple[str, int], ...]
"""The devices of a group of workers: how many there are of each."""
Start = Literal["first", "replacement"]
"""Kind of a process's start beside the steps of others: one that an undisturbed run has too, or a replacement."""


@dataclass
class MembershipTimes:
    """A group of hosts that step together; times in seconds since the run began.

    Args:
        from_step: the last step finished in the state that it starts from.
        at: when it was formed.
        driver: when its driver began.
    """

    from_step: int
    at: float
    driver: float
    devices: dict[str, str] = field(default_factory=dict)  # of each host that has stepped
    before: dict[str, int] = field(default_factory=dict)  # kind → last step of which earlier memberships finished it
    finished: dict[str, int] = field(default_factory=dict)  # kind → last step of which this one finished it
    clock: str | None = None  # the host by whose records the group is timed, the first that finished a step
    first_step: int | None = None  # of the clock's, as all that follows
    timed_step: int = 0
    first_start: float = 0.0
    first_end: float = 0.0
    last_end: float = 0.0
    stalls: float = 0.0  # seconds of the time from first_end to last_end
    stalls_since: float = 0.0  # seconds since last_end
    stall_seconds: dict[str, float] = field(default_factory=dict)  # by kind
    stall_counts: Counter[str] = field(default_factory=Counter)
    new_stalls: Counter[str] = field(default_factory=Counter)  # their number without those made again
    new_stalls_since: Counter[str] = field(default_factory=Counter)  # those since last_end
    beside_steps: Counter[str] = field(default_factory=Counter)  # steady steps beside starts, by kind
    beside_seconds: dict[str, float] = field(default_factory=dict)  # theirs, without stalls

    def __post_init__(self) -> None:
        for name in ("stall_counts", "new_stalls", "new_stalls_since", "beside_steps"):  # JSON has no counters
            setattr(self, name, Counter(getattr(self, name)))

    @property
    def group(self) -> DeviceGroup:
        """Groups of equal devices are as fast as each other."""
        return tuple(sorted(Counter(self.devices.values()).items()))

    @property
    def last_step(self) -> int:
        return self.finished.get("step", self.from_step)

    @property
    def span(self) -> float:
        """Seconds from the end of its first step to the end of its last."""
        return self.last_end - self.first_end

    @property
    def steady_steps(self) -> int:
        """Steps after the first."""
        return self.timed_step - (self.first_step or 0)

    @property
    def steady_seconds(self) -> float:
        """Seconds of the steady steps, without stalls."""
        return self.span - self.stalls

    def follow(self, earlier: "MembershipTimes") -> None:
        """Take over from an earlier membership what was finished before."""
        for kind in {*earlier.before, *earlier.finished}:
            last = max(earlier.before.get(kind, 0), earlier.finished.get(kind, 0))
            self.before[kind] = max(self.before.get(kind, 0), last)

    def note(
        self,
        host: str,
        device: str,
        step: int,
        seconds: Mapping[str, float],
        start: float,
        ended: float,
        beside: Start | None,
    ) -> None:
        """Take in what a host did from ``start`` to ``ended``: the step, or what followed it.

        ``beside`` is the kind of another host's start at the time of the step.
        """
        if "step" in seconds:
            self.devices[host] = device
            self.clock = self.clock or host
            self.finished["step"] = max(self.finished.get("step", 0), step)
        if host != self.clock:
            return
        for kind in seconds.keys() & _STALLS:
            self.stalls_since += seconds[kind]
            self.stall_seconds[kind] = self.stall_seconds.get(kind, 0.0) + seconds[kind]
            self.stall_counts[kind] += 1
            if step > max(self.before.get(kind, 0), self.finished.get(kind, 0)):
                self.new_stalls_since[kind] += 1
                self.finished[kind] = step
        if "step" in seconds:
            self._time_step(step, start, ended, beside)

    def _time_step(self, step: int, start: float, ended: float, beside: Start | None) -> None:
        if beside and self.first_step is not None:
            self.beside_steps[beside] += step - self.timed_step
            took = ended - self.last_end - self.stalls_since
            self.beside_seconds[beside] = self.beside_seconds.get(beside, 0.0) + took
        if self.first_step is None:
            self.first_step, self.first_start, self.first_end = step, start, ended
            self.stalls_since = 0.0
            if "step" not in self.before:  # the run's very first
                self.new_stalls_since.clear()
        self.timed_step, self.last_end = step, ended
        self.stalls, self.stalls_since = self.stalls + self.stalls_since, 0.0
        self.new_stalls += self.new_stalls_since
        self.new_stalls_since.clear()
