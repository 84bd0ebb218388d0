"""The ledger: every second of every worker is accounted for, and from it follow goodput, lost work, energy and cost.

It takes the run's events, whose times are of the driver's monotonic clock and never of a wall clock, and keeps sums, so
that its memory grows neither with the steps nor with the memberships and hosts that ever were: what is over is added to
sums, those of a machine and device for a host. How goodput is reckoned stands in `cluster.accounts.goodput`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

from cluster.accounts.figures import Figures, WorkerFigures
from cluster.accounts.goodput import RunSums
from cluster.accounts.host_account import HostAccount
from cluster.accounts.membership_times import MembershipTimes, Start
from cluster.accounts.timeline import Kind, Timeline, TimelineBins
from cluster.elastic.events import Event, HostJoined, HostLeft, HostStarted, HostStarting, MembershipFormed
from doge.common.errors import UserError

# The latest of each, of which something may still be told.
_MEMBERSHIPS_KEPT = 16
_DEPARTED_KEPT = 32


@dataclass(frozen=True)
class LedgerRecipe:
    prices_per_hour: dict[str, float] = field(default_factory=dict)
    """Price of one device per hour, by a part of its name, such as "RTX 4090"; the longest match counts."""
    currency: str = "$"
    """Currency of all prices; only printed."""
    electricity_per_kwh: float = 0.0
    """Price of a kilowatt-hour, added for devices whose energy can be read."""

    def __post_init__(self) -> None:
        prices = {f"prices_per_hour.{name}": price for name, price in self.prices_per_hour.items()}
        for name, price in (prices | {"electricity_per_kwh": self.electricity_per_kwh}).items():
            if not 0 <= price < inf:
                raise UserError(f"ledger.{name} must be finite and not negative, not {price}.")

    def price_per_hour(self, device: str) -> float | None:
        """None where no price fits the device."""
        parts = [part for part in self.prices_per_hour if part.lower() in device.lower()]
        return self.prices_per_hour[max(parts, key=len)] if parts else None


@dataclass(frozen=True)
class DriverStarted(Event):
    """A driver of the run begins; all hosts of an earlier one are gone.

    Args:
        at: by its monotonic clock, which has nothing to do with an earlier driver's.
        parameters: of the run, by their dotted names, as texts.
    """

    at: float
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkEnded(Event):
    """The hosts of this driver have done what there was to do, or were stopped."""

    at: float


@dataclass(frozen=True)
class StepRecord(Event):
    """The work of a host since its last record: one optimizer step, or an evaluation or a checkpoint after one.

    Args:
        host: the training process's name, unique in the run.
        node: name of its machine.
        device: name of its device, as `doge.common.hardware.device_name` gives it.
        membership: number of the group it steps in.
        step: the last step finished, counted from 1.
        ended: when, in seconds of the driver's monotonic clock.
        seconds: what the time went to, in the order in which it did. The record is of a step if it holds ``step``.
        sequences: what the host took of the step's sequences; 0 in a record of no step.
        energy_joules: what its device used since its last record, None where unreadable. A CPU's is the whole node's:
            the ledger divides it among the hosts there.
    """

    host: str
    node: str
    device: str
    membership: int
    step: int
    ended: float
    seconds: Mapping[str, float]
    sequences: int = 0
    energy_joules: float | None = None


class Ledger:
    """Takes in what happens and keeps the sums; times are seconds of the driver's monotonic clock.

    It never refuses what it is told, since an account must not end a run: a host or membership that it has not heard of
    begins with its first record, and a record that is not newer than its host's last, or is of a membership long over,
    changes nothing.

    Args:
        tokens_per_step: of the global batch.
        tokens_per_sequence: ``sequence_length``.
    """

    def __init__(self, tokens_per_step: int, tokens_per_sequence: int):
        self.tokens_per_step, self.tokens_per_sequence = tokens_per_step, tokens_per_sequence
        self._hosts: dict[str, HostAccount] = {}
        self._past = RunSums()
        self._memberships: list[MembershipTimes] = []  # the latest, which are not in the sums
        self._first = 0  # how many were before them
        self._over: int | None = None  # the number of this driver's last that was added to the sums
        self._drivers: list[float] = [0.0]  # when each driver began, on the ledger's own clock that stops in between
        self._timeline = TimelineBins()
        self._end = 0.0
        self._index: dict[int, int] = {}  # of this driver's memberships, how many were before them, by number
        self._origin: float | None = None  # the driver's clock when it began
        self._starts: dict[str, tuple[Start, float, float]] = {}  # of this driver's hosts: from when to when

    def take(self, event: Event) -> None:
        """Account for an event; events of other kinds change nothing."""
        match event:
            case DriverStarted():
                self._begin(event.at)
            case HostStarting():
                self._forget_starts()
                kind: Start = "replacement" if event.replaces or len(self._drivers) > 1 else "first"
                self._starts[event.host] = (kind, self._time(event.at), inf)
            case HostStarted() if event.host in self._starts:
                self._starts[event.host] = (*self._starts[event.host][:2], self._time(event.at))
            case HostJoined():
                self._join(event.host, event.node, "", event.at)
            case HostLeft():
                self._leave(event.host, event.at)
                self._join_departed()
            case MembershipFormed():
                self._form(event.number, event.from_step, event.at)
            case StepRecord():
                self._record(event)
            case WorkEnded():
                for host in self._hosts:
                    self._leave(host, event.at)

    def _begin(self, at: float) -> None:
        if self._origin is not None or self._hosts:  # an earlier driver is gone, and its hosts with it
            for name, host in self._hosts.items():
                host.left = self._until(host)
                self._book(name, host, self._tail_kind(host), host.left)
            self._drivers.append(self._end)
            self._origin = self._over = None
            self._index.clear()
            self._starts.clear()
            self._join_departed()
        self._time(at)

    def _join(self, name: str, node: str, device: str, at: float) -> None:
        """The host was asked for; its ``start`` begins."""
        now = self._time(at)
        known = self._hosts.get(name)
        if known is None:
            self._hosts[name] = HostAccount(node, device, joined=now, booked=now)
        elif known.left is not None and now >= known.left:
            self._end_stay(name, known)
            known.node, known.device = node, device
            known.joined = known.booked = now
            known.left = known.membership = None

    def _leave(self, name: str, at: float) -> None:
        """The host died or was let go. Its records may still come in later."""
        now, known = self._time(at), self._hosts.get(name)
        if known is not None and known.left is None:
            known.left = max(now, known.booked)

    def _form(self, number: int, from_step: int, at: float) -> None:
        """A new group is formed, whose first step is ``from_step`` + 1."""
        now = self._time(at)
        if number not in self._index:
            self._index[number] = self._first + len(self._memberships)
            member = MembershipTimes(from_step, now, self._drivers[-1])
            if self._memberships:
                member.follow(self._memberships[-1])
                self._timeline.mark(now)
            self._memberships.append(member)
            if len(self._memberships) > _MEMBERSHIPS_KEPT:
                self._add_oldest()

    def _add_oldest(self) -> None:
        """Add the oldest membership to the sums."""
        for name, host in self._hosts.items():
            if host.left is not None and host.left <= self._memberships[1].at:
                self._book(name, host, self._tail_kind(host), self._until(host))
        self._past.add(self._memberships.pop(0))
        over = [number for number, place in self._index.items() if place == self._first]
        for number in over:
            self._over = number
            del self._index[number]
        self._first += 1

    def _record(self, record: StepRecord) -> None:
        """Book what a host did since its last record."""
        if self._over is not None and record.membership <= self._over:
            return
        took = sum(record.seconds.values())
        self._time(record.ended - took)  # the first that a driver hears may be this
        ended = self._time(record.ended)
        if record.host not in self._hosts:
            self._join(record.host, record.node, record.device, record.ended - took)
        if record.membership not in self._index:
            self._form(record.membership, record.step - ("step" in record.seconds), record.ended - took)
        host, index = self._hosts[record.host], self._index[record.membership]
        member = self._memberships[index - self._first]
        if ended <= host.booked:
            return
        # A host that knows its device better than the one who asked for it, who may not have seen the machine.
        host.node, host.device = record.node, record.device
        start = max(ended - took, host.booked)
        if start > host.booked:
            self._book(record.host, host, self._gap(host, index), start)
        repeated = record.step <= member.before.get("step", 0)
        for kind, seconds in record.seconds.items():
            scaled = seconds * (ended - start) / took if took else 0.0
            self._book(record.host, host, "repeated" if repeated else kind, host.booked + scaled)
        host.booked = ended
        host.membership = index
        if host.left is not None:
            host.left = max(host.left, ended)
        if not repeated:
            host.sequences += record.sequences
        if record.energy_joules is not None:
            host.joules = (host.joules or 0.0) + record.energy_joules / self._sharers(host)
        beside = self._beside(start, ended) if "step" in record.seconds else None
        member.note(record.host, record.device, record.step, record.seconds, start, ended, beside)
        for earlier, later in pairwise(self._memberships[index - self._first :]):  # news that comes late
            later.follow(earlier)

    def figures(self, recipe: LedgerRecipe) -> Figures:
        """The figures of everything so far."""
        workers = [self._worker(" ".join(host.names(name)), host, recipe) for name, host in self._hosts.items()]
        seconds: Counter[str] = Counter()
        for worker in workers:
            seconds.update(worker.seconds_of)
        total, made = seconds.total(), self._past.totals(self._memberships, self._end)
        tokens = made.steps * self.tokens_per_step
        energy = [worker.energy_kwh for worker in workers if worker.energy_kwh is not None]
        costs = [worker.cost for worker in workers if worker.cost is not None]
        rate = made.steps_per_s
        return Figures(
            wall_seconds=self._end,
            goodput=made.goodput,
            lost=dict(made.lost),
            shares={kind: spent / total for kind, spent in seconds.items()} if total else {},
            steps=made.steps,
            lost_steps=made.lost_steps,
            restarts=made.restarts,
            restart_seconds=made.restart_seconds,
            tokens=tokens,
            tokens_per_s=tokens / self._end if self._end else 0.0,
            undisturbed_tokens_per_s=None if rate is None else rate * self.tokens_per_step,
            energy_kwh=sum(energy) if energy else None,
            cost=sum(costs) if costs else None,
            currency=recipe.currency,
            unpriced=sorted({w.device for w in workers if w.device and recipe.price_per_hour(w.device) is None}),
            workers=workers,
        )

    def timeline(self) -> Timeline:
        """The timeline of everything so far."""
        bins = deepcopy(self._timeline)
        for name, host in self._hosts.items():
            bins.add(name, self._tail_kind(host), host.booked, self._until(host))
        lanes = bins.lanes({name: (host.node, host.device, host.names(name)) for name, host in self._hosts.items()})
        return Timeline(lanes, bins.bin_seconds, self._end, bins.changes, bins.marks, self._drivers[1:])

    def to_dict(self) -> dict[str, Any]:
        """The whole ledger as JSON values."""
        starts = {
            host: [kind, since, None if until == inf else until] for host, (kind, since, until) in self._starts.items()
        }
        return {
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_sequence": self.tokens_per_sequence,
            "end": self._end,
            "drivers": self._drivers,
            "origin": self._origin,
            "index": list(self._index.items()),
            "starts": starts,
            "hosts": {name: asdict(host) for name, host in self._hosts.items()},
            "past": self._past.to_dict(),
            "memberships": [deepcopy(vars(member)) for member in self._memberships],
            "first": self._first,
            "over": self._over,
            "timeline": self._timeline.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Ledger":
        """The ledger that `to_dict` gave, of this driver or, once `DriverStarted` comes, of an earlier one."""
        ledger = cls(values["tokens_per_step"], values["tokens_per_sequence"])
        ledger._end = values["end"]
        ledger._drivers = list(values["drivers"])
        ledger._origin = values.get("origin")
        ledger._index = dict(values.get("index", []))
        starts = values.get("starts", {}).items()
        ledger._starts = {host: (kind, since, inf if until is None else until) for host, (kind, since, until) in starts}
        ledger._hosts = {name: HostAccount(**host) for name, host in values["hosts"].items()}
        ledger._past = RunSums.from_dict(values["past"])
        ledger._memberships = [MembershipTimes(**member) for member in values["memberships"]]
        ledger._first, ledger._over = values["first"], values["over"]
        ledger._timeline = TimelineBins.from_dict(values["timeline"])
        return ledger

    def _time(self, at: float) -> float:
        """Convert a time of the driver's clock to seconds since the run began; the first event begins the run."""
        if self._origin is None:
            self._origin = at - self._drivers[-1]
        now = max(at - self._origin, self._drivers[-1])
        self._end = max(self._end, now)
        return now

    def _beside(self, start: float, ended: float) -> Start | None:
        """The kind of a host's start within that time, if there was one."""
        kinds = {kind for kind, since, until in self._starts.values() if since < ended and start < until}
        return "replacement" if "replacement" in kinds else "first" if kinds else None

    def _forget_starts(self) -> None:
        """Drop the starts that were over before anything that is not booked yet."""
        unbooked = min((host.booked for host in self._hosts.values() if host.left is None), default=0.0)
        self._starts = {host: start for host, start in self._starts.items() if start[2] > unbooked}

    def _book(self, name: str, host: HostAccount, kind: str, until: float) -> None:
        host.seconds[kind] = host.seconds.get(kind, 0.0) + until - host.booked
        self._timeline.add(name, kind, host.booked, until)
        host.booked = until

    def _gap(self, host: HostAccount, index: int) -> Kind:
        """The kind of the time between two records, the later of which is in the membership with ``index``."""
        if host.membership is None:
            return "start"
        return "restart" if index > host.membership else "idle"

    def _tail_kind(self, host: HostAccount) -> Kind:
        """The kind of the time after a host's last record."""
        last = next((at for at, m in enumerate(self._memberships) if m.at > self._until(host)), len(self._memberships))
        return self._gap(host, self._first + min(last, len(self._memberships) - 1))

    def _until(self, host: HostAccount) -> float:
        return max(self._end if host.left is None else host.left, host.booked)

    def _end_stay(self, name: str, host: HostAccount) -> None:
        self._book(name, host, self._tail_kind(host), self._until(host))
        host.present += host.booked - host.joined

    def _join_departed(self) -> None:
        """Of the hosts that left, but for the latest, keep one account per machine, device and lane of the timeline."""
        departed = sorted((host.left, name) for name, host in self._hosts.items() if host.left is not None)
        accounts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for _, name in departed[:-_DEPARTED_KEPT]:
            host = self._hosts[name]
            self._book(name, host, self._tail_kind(host), self._until(host))
            same = accounts[host.node, host.device]
            into = next((other for other in same if self._timeline.join(name, other)), None)
            if into is None:
                same.append(name)
            else:
                self._hosts[into].take_over(name, self._hosts.pop(name))

    def _sharers(self, host: HostAccount) -> int:
        """Hosts that one energy counter counts: a GPU has its own, a node's CPU hosts have one together."""
        if not host.device.startswith("CPU"):
            return 1
        same = (h for h in self._hosts.values() if h.node == host.node and h.device.startswith("CPU"))
        return max(1, sum(h.left is None for h in same))

    def _worker(self, name: str, host: HostAccount, recipe: LedgerRecipe) -> WorkerFigures:
        kind, until = self._tail_kind(host), self._until(host)
        seconds = {**host.seconds, kind: host.seconds.get(kind, 0.0) + until - host.booked}
        present = host.present + until - host.joined
        energy = None if host.joules is None else host.joules / 3.6e6
        price = recipe.price_per_hour(host.device)
        cost = None if price is None else price * present / 3600
        if energy is not None and recipe.electricity_per_kwh:
            cost = (cost or 0.0) + energy * recipe.electricity_per_kwh
        tokens = host.sequences * self.tokens_per_sequence
        seconds = {kind: spent for kind, spent in seconds.items() if spent > 0}
        return WorkerFigures(name, host.node, host.device, present, tokens, energy, cost, seconds)
