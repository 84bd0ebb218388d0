"""Goodput: what an observer outside would measure of a run whose workers come and go.

Goodput is the steps that count over the steps that an undisturbed run of equal length would have made. With

    T      from the end of the run's first step to the end of its last (to now, while a restart is going on);
           time between two drivers, when nothing ran, is no part of it
    C      steps finished within T, each counted once however often it was made
    r(g)   1 / (τ(g) + σ(g)), the undisturbed steps a second of a group of workers with devices g. τ(g) is the mean
           time of their steps, waiting for data and for others included, without each membership's first and, where
           enough others are left, without those beside the start of a process, which takes its share of a machine.
           σ(g) is their stall for checkpoints and evaluations: how many there were for each step that counts, over all
           groups and each counted once as well, × how long one takes g (any group, where g had none). An undisturbed
           run has all of these too, so they are no loss. Groups of equal devices are taken together
    R(t)   the highest r of all groups that had begun by t (and made ten steps): the full group, weighted by its speed.
           A run that grows is held to its new speed from then on; one that shrank is held to its old one
    E      what the steps of the full group took longer than τ beside starts that an undisturbed run has as well: those
           of the first spares

goodput = C / ∫_T∖E R(t) dt. A run in one membership has exactly 1. What is lost splits into four: *repeated* (steps
made more than once), *absence* (the time in smaller groups × what they were slower than R), *spares* (what the full
group's steps took longer beside starts in the place of lost ones), and *restarts* (the rest: no step was made, or the
slow first step of a membership). The share of the workers' time spent computing steps is another number, the *busy
share*: a run that waits for its disk most of the time has a small one, and a goodput of 1.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Literal

# Fewer steps than this are too few to measure a group's speed.
_TELLING_STEPS = 10
_STALLS = {"checkpoint", "evaluation"}

DeviceGroup = tuple[str, ...]
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
        return tuple(sorted(self.devices.values()))

    @property
    def last_step(self) -> int:
        return self.finished.get("step", self.from_step)

    @property
    def steady_steps(self) -> int:
        """Steps after the first."""
        return self.timed_step - (self.first_step or 0)

    @property
    def steady_seconds(self) -> float:
        """Seconds of the steady steps, without stalls."""
        return self.last_end - self.first_end - self.stalls

    @property
    def clear_steps(self) -> int:
        """Steady steps beside no start."""
        return self.steady_steps - self.beside_steps.total()

    @property
    def clear_seconds(self) -> float:
        return self.steady_seconds - sum(self.beside_seconds.values())

    def seconds_lost_beside(self, start: Start, usual: float) -> float:
        """Seconds that its steps beside such starts took beyond ``usual`` seconds each."""
        return max(0.0, self.beside_seconds.get(start, 0.0) - self.beside_steps[start] * usual)

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


@dataclass(frozen=True)
class RunTotals:
    """Totals over a run's memberships.

    Args:
        steps: finished, each counted once, as far as they were told.
        lost_steps: made and then made again.
        restart_seconds: of each restart, from the last step before to the beginning of the first after.
        goodput: between 0 and 1; None before a group has made two steps.
        lost: what goodput lacks to 1, by cause: ``repeated``, ``absence``, ``spares``, ``restarts``.
        steps_per_s: of the fastest group, undisturbed.
    """

    steps: int = 0
    lost_steps: int = 0
    restart_seconds: Sequence[float] = ()
    goodput: float | None = None
    lost: Mapping[str, float] = field(default_factory=dict)
    steps_per_s: float | None = None


def run_totals(memberships: Sequence[MembershipTimes], now: float) -> RunTotals:
    """Reckon up all memberships of a run; ``now`` is in seconds since it began."""
    stepped = [member for member in memberships if member.first_step is not None]
    if not stepped:
        return RunTotals()
    last = max(member.last_step for member in stepped)
    # Steps that a crashed driver made but never recorded.
    unseen = sum(max(0, member.from_step - member.before.get("step", member.from_step)) for member in stepped[1:])
    steps = last - stepped[0].from_step - unseen
    lost_steps = sum(member.last_step - member.from_step for member in stepped) - steps
    restarts = [max(0.0, after.first_start - max(before.last_end, after.driver)) for before, after in pairwise(stepped)]
    counted = steps - ((stepped[0].first_step or 0) - stepped[0].from_step)
    usual, clear = _usual_seconds(stepped)
    stall = _stalls(stepped, counted)
    rates = {group: 1 / (seconds + stall(group)) for group, seconds in usual.items()}
    bars = list(_bars(stepped, rates))
    begin = stepped[0].first_end
    end = max(member.last_end for member in stepped) if memberships[-1].first_step is not None else now
    if not bars or end <= begin:
        return RunTotals(steps, lost_steps, restarts)

    def possible(start: float, stop: float) -> float:
        """Steps of an undisturbed run."""
        return sum(
            rates[group] * max(0.0, min(stop, until) - max(start, since))
            for (since, group), (until, _) in pairwise([*bars, (inf, ())])
        )

    undisturbed, absent, slowed = possible(begin, end), 0.0, 0.0
    for member in stepped:
        full = [group for since, group in bars if since <= member.at][-1]
        if member.group != full:
            absent += possible(member.first_end, member.last_end) - member.steady_steps
            continue
        if member.group in clear:
            undisturbed -= member.seconds_lost_beside("first", usual[full]) * rates[full]
            slowed += member.seconds_lost_beside("replacement", usual[full]) * rates[full]
    lost = {"repeated": lost_steps, "absence": max(0.0, absent), "spares": slowed}
    lost = {cause: steps / undisturbed for cause, steps in lost.items()}
    lost["restarts"] = max(0.0, 1 - counted / undisturbed - sum(lost.values()))
    return RunTotals(steps, lost_steps, restarts, min(1.0, counted / undisturbed), lost, rates[bars[-1][1]])


def _usual_seconds(stepped: Sequence[MembershipTimes]) -> tuple[dict[DeviceGroup, float], set[DeviceGroup]]:
    """Seconds of a step for every group that made enough of them, or for the one that made the most if none did.

    Also the groups of which they are the time of clear steps.
    """
    steps: Counter[DeviceGroup] = Counter()
    clear_steps: Counter[DeviceGroup] = Counter()
    seconds: defaultdict[DeviceGroup, float] = defaultdict(float)
    clear_seconds: defaultdict[DeviceGroup, float] = defaultdict(float)
    for member in stepped:
        steps[member.group] += member.steady_steps
        seconds[member.group] += member.steady_seconds
        clear_steps[member.group] += member.clear_steps
        clear_seconds[member.group] += member.clear_seconds
    known = [group for group in steps if steps[group] and seconds[group] > 0]
    if not known:
        return {}, set()
    telling = [group for group in known if steps[group] >= _TELLING_STEPS] or [max(known, key=steps.__getitem__)]
    clear = {group for group in telling if clear_steps[group] >= _TELLING_STEPS and clear_seconds[group] > 0}
    usual = {group: seconds[group] / steps[group] for group in telling}
    return usual | {group: clear_seconds[group] / clear_steps[group] for group in clear}, clear


def _stalls(stepped: Sequence[MembershipTimes], counted: int) -> Callable[[DeviceGroup], float]:
    """Seconds of stall a step, for every group."""
    numbers = sum((member.new_stalls + member.new_stalls_since for member in stepped), Counter())
    numbers -= stepped[-1].new_stalls_since  # what came after the last step of all is not in front of a step

    def of(group: DeviceGroup) -> float:
        total = 0.0
        for kind, number in numbers.items():
            had = [member for member in stepped if member.stall_counts[kind]]
            own = [member for member in had if member.group == group] or had
            mean = sum(member.stall_seconds[kind] for member in own) / sum(member.stall_counts[kind] for member in own)
            total += mean * number / max(1, counted)
        return total

    return of


def _bars(
    stepped: Sequence[MembershipTimes], rates: Mapping[DeviceGroup, float]
) -> Iterator[tuple[float, DeviceGroup]]:
    """(time, group) pairs: from then on this group's speed is the reference."""
    best = 0.0
    for member in stepped:
        if rates.get(member.group, 0.0) > best:
            yield member.at if best else -inf, member.group
            best = rates[member.group]
