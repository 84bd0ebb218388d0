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

All of it follows from sums over the memberships of equal devices: one that is over is added to them and forgotten.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Any

from cluster.accounts.membership_times import DeviceGroup, MembershipTimes, Start

# Fewer steps than this are too few to measure a group's speed.
_TELLING_STEPS = 10
_MOST_SUMS = 512
_RESTARTS_KEPT = 255
_VARIOUS: DeviceGroup = ()
"""Stands for groups that are no longer told apart."""
_COUNTERS = ("beside_steps", "beside_seconds", "stall_counts", "stall_seconds")


@dataclass
class _GroupSums:
    """Sums over memberships of one group, between two first appearances of groups of other devices.

    Args:
        since: when the first of them was formed, in seconds since the run began.
        span: seconds from the end of each one's first step to the end of its last.
    """

    group: DeviceGroup
    since: float
    span: float = 0.0
    steady_steps: int = 0
    steady_seconds: float = 0.0
    beside_steps: Counter[str] = field(default_factory=Counter)
    beside_seconds: Counter[str] = field(default_factory=Counter)
    stall_counts: Counter[str] = field(default_factory=Counter)
    stall_seconds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name in _COUNTERS:  # JSON has no counters
            setattr(self, name, Counter(getattr(self, name)))

    def __iadd__(self, other: "_GroupSums | MembershipTimes") -> "_GroupSums":
        self.span += other.span
        self.steady_steps += other.steady_steps
        self.steady_seconds += other.steady_seconds
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        return self

    @property
    def clear_steps(self) -> int:
        """Steady steps beside no start."""
        return self.steady_steps - self.beside_steps.total()

    @property
    def clear_seconds(self) -> float:
        return self.steady_seconds - self.beside_seconds.total()

    def seconds_lost_beside(self, start: Start, usual: float) -> float:
        """Seconds that its steps beside such starts took beyond ``usual`` seconds each."""
        return max(0.0, self.beside_seconds[start] - self.beside_steps[start] * usual)


@dataclass(frozen=True)
class RunTotals:
    """Totals over a run's memberships.

    Args:
        steps: finished, each counted once, as far as they were told.
        lost_steps: made and then made again.
        restarts: times that stepping stopped and began anew.
        restart_seconds: median of the latest 255 restarts, each from the last step before to the beginning of the first
            after; None without a restart.
        goodput: between 0 and 1; None before a group has made two steps.
        lost: what goodput lacks to 1, by cause: ``repeated``, ``absence``, ``spares``, ``restarts``.
        steps_per_s: of the fastest group, undisturbed.
    """

    steps: int = 0
    lost_steps: int = 0
    restarts: int = 0
    restart_seconds: float | None = None
    goodput: float | None = None
    lost: Mapping[str, float] = field(default_factory=dict)
    steps_per_s: float | None = None


@dataclass
class RunSums:
    """Sums over the memberships of a run, which are added in the order in which they were formed.

    The number of groups is bounded: of too many, those that made the fewest steps are told apart no longer. Their steps
    count, and their time is held to the full group's speed.
    """

    sums: list[_GroupSums] = field(default_factory=list)
    seen: dict[DeviceGroup, float] = field(default_factory=dict)  # group → when it was formed first
    from_step: int = 0  # of the first that stepped, as the next two
    first_step: int | None = None
    first_end: float = 0.0
    last_step: int = 0
    last_end: float = 0.0
    made: int = 0  # steps, those made again counted again
    unseen: int = 0  # steps that a crashed driver made but never recorded
    new_stalls: Counter[str] = field(default_factory=Counter)
    trailing_stalls: Counter[str] = field(default_factory=Counter)  # those after the last step of all
    stepping: bool = False  # whether the latest membership has made a step
    restarts: int = 0
    restart_seconds: list[float] = field(default_factory=list)  # the latest

    def add(self, member: MembershipTimes) -> None:
        """Add a membership; nothing that is told of it later counts."""
        self.stepping = member.first_step is not None
        if member.first_step is None:
            return
        if self.first_step is None:
            self.from_step, self.first_step, self.first_end = member.from_step, member.first_step, member.first_end
        else:
            self.unseen += max(0, member.from_step - member.before.get("step", member.from_step))
            self.restarts += 1
            self.restart_seconds.append(max(0.0, member.first_start - max(self.last_end, member.driver)))
            del self.restart_seconds[:-_RESTARTS_KEPT]
        self.last_step, self.last_end = max(self.last_step, member.last_step), max(self.last_end, member.last_end)
        self.made += member.last_step - member.from_step
        self.new_stalls += member.new_stalls + member.new_stalls_since
        self.trailing_stalls = +member.new_stalls_since
        sums = self._sums_of(member.group, member.at)
        sums += member
        if len(self.sums) > _MOST_SUMS:
            self._forget_small_groups()

    def totals(self, later: Iterable[MembershipTimes], now: float) -> RunTotals:
        """Reckon up the run with ``later`` memberships, which are not added; ``now`` is in seconds since it began."""
        whole = deepcopy(self)
        for member in later:
            whole.add(member)
        return whole._reckon(now)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return deepcopy(vars(self) | {"seen": list(self.seen.items()), "sums": [vars(sums) for sums in self.sums]})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunSums":
        run = cls(**values)
        run.seen = {_as_group(group): since for group, since in values["seen"]}
        run.sums = [_GroupSums(**{**sums, "group": _as_group(sums["group"])}) for sums in values["sums"]]
        run.new_stalls, run.trailing_stalls = Counter(run.new_stalls), Counter(run.trailing_stalls)
        return run

    def _sums_of(self, group: DeviceGroup, at: float) -> _GroupSums:
        """The group's since a new one appeared last, begun where there are none."""
        if group not in self.seen:
            self.seen[group] = at
        appeared = max(self.seen.values())
        for sums in reversed(self.sums):
            if sums.since < appeared:
                break
            if sums.group == group:
                return sums
        self.sums.append(_GroupSums(group, at))
        return self.sums[-1]

    def _forget_small_groups(self) -> None:
        """Halve the number of sums. Those of the groups that were ever full stay apart, and from when to when."""
        bars = list(self._bars(self._rates()[0]))
        joined: dict[tuple[DeviceGroup, int], _GroupSums] = {}

        def join(sums: _GroupSums, group: DeviceGroup) -> None:
            part = sum(since <= sums.since for since, _ in bars)
            into = joined.setdefault((group, part), _GroupSums(group, sums.since))
            into += sums

        full = {group for _, group in bars}
        largest = sorted(self.sums, key=lambda sums: (sums.group in full, sums.steady_steps), reverse=True)
        for place, sums in enumerate(largest):
            join(sums, sums.group if place < _MOST_SUMS // 2 else _VARIOUS)
        self.sums = sorted(joined.values(), key=lambda sums: sums.since)
        known = full | {sums.group for sums in self.sums}
        self.seen = {group: since for group, since in self.seen.items() if group in known}

    def _reckon(self, now: float) -> RunTotals:
        if self.first_step is None:
            return RunTotals()
        steps = self._steps
        lost_steps = self.made - steps
        restart_seconds = statistics.median(self.restart_seconds) if self.restart_seconds else None
        totals = RunTotals(steps, lost_steps, self.restarts, restart_seconds)
        rates, usual, clear = self._rates()
        bars = list(self._bars(rates))
        end = self.last_end if self.stepping else now
        if not bars or end <= self.first_end:
            return totals
        undisturbed = sum(
            rates[group] * max(0.0, min(end, until) - max(self.first_end, since))
            for (since, group), (until, _) in pairwise([*bars, (inf, _VARIOUS)])
        )
        absent = slowed = 0.0
        for sums in self.sums:
            full = [group for since, group in bars if since <= sums.since][-1]
            if sums.group != full:
                absent += rates[full] * sums.span - sums.steady_steps
            elif sums.group in clear:
                undisturbed -= sums.seconds_lost_beside("first", usual[full]) * rates[full]
                slowed += sums.seconds_lost_beside("replacement", usual[full]) * rates[full]
        lost = {"repeated": lost_steps, "absence": max(0.0, absent), "spares": slowed}
        lost = {cause: steps / undisturbed for cause, steps in lost.items()}
        lost["restarts"] = max(0.0, 1 - self._counted / undisturbed - sum(lost.values()))
        goodput = min(1.0, self._counted / undisturbed)
        return replace(totals, goodput=goodput, lost=lost, steps_per_s=rates[bars[-1][1]])

    @property
    def _steps(self) -> int:
        return self.last_step - self.from_step - self.unseen

    @property
    def _counted(self) -> int:
        """Steps after the end of the first."""
        return self._steps - ((self.first_step or 0) - self.from_step)

    def _rates(self) -> tuple[dict[DeviceGroup, float], dict[DeviceGroup, float], set[DeviceGroup]]:
        """Undisturbed steps a second of every group that made enough steps, or of the one that made most if none did.

        Also seconds of a step without stalls, and the groups of which they are those of clear steps.
        """
        groups: dict[DeviceGroup, _GroupSums] = {}
        for sums in self.sums:
            if sums.group != _VARIOUS:
                group = groups.setdefault(sums.group, _GroupSums(sums.group, sums.since))
                group += sums
        known = [group for group in groups.values() if group.steady_steps and group.steady_seconds > 0]
        if not known:
            return {}, {}, set()
        telling = [group for group in known if group.steady_steps >= _TELLING_STEPS]
        telling = telling or [max(known, key=lambda group: group.steady_steps)]
        usual, clear = {}, set()
        for group in telling:
            usual[group.group] = group.steady_seconds / group.steady_steps
            if group.clear_steps >= _TELLING_STEPS and group.clear_seconds > 0:
                usual[group.group] = group.clear_seconds / group.clear_steps
                clear.add(group.group)
        return {group: 1 / (seconds + self._stall(groups[group])) for group, seconds in usual.items()}, usual, clear

    def _stall(self, group: _GroupSums) -> float:
        """Seconds of stall a step; those of any group, where it had none."""
        total = 0.0
        for kind, number in (self.new_stalls - self.trailing_stalls).items():
            had = [group] if group.stall_counts[kind] else self.sums
            mean = sum(sums.stall_seconds[kind] for sums in had) / sum(sums.stall_counts[kind] for sums in had)
            total += mean * number / max(1, self._counted)
        return total

    def _bars(self, rates: Mapping[DeviceGroup, float]) -> Iterator[tuple[float, DeviceGroup]]:
        """(time, group) pairs: from then on this group's speed is the reference."""
        best = 0.0
        for group, since in self.seen.items():
            if rates.get(group, 0.0) > best:
                yield since if best else -inf, group
                best = rates[group]


def _as_group(values: Iterable[Iterable[Any]]) -> DeviceGroup:
    """JSON has no tuples."""
    return tuple((device, number) for device, number in values)
