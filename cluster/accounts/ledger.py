"""The ledger: every second of every worker is accounted for, and from it follow goodput, lost work, energy and cost.

It is told what happens (`starting`, `started`, `joined`, `left`, `membership`, `record`) in the driver's monotonic
clock, never a wall clock, and keeps sums, so that its memory does not grow with the steps. How goodput is reckoned
stands in `cluster.accounts.goodput`.
"""

import statistics
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from typing import Any, Literal

from cluster.accounts.figures import Figures, WorkerFigures
from cluster.accounts.goodput import Membership, Start, progress
from cluster.accounts.timeline import TimelineBins
from doge.common.errors import UserError
from doge.reporting.plots import Timeline

Kind = Literal["start", "step", "data", "others", "checkpoint", "evaluation", "restart", "repeated", "idle"]
"""What a worker's second went to.

A worker posts ``step`` (computing its share and updating), ``data`` (waiting for data), ``others`` (waiting for other
workers), ``checkpoint`` (the stall of gathering state) and ``evaluation``. The ledger derives ``start`` (from being
asked for to the first step), ``restart`` (between two memberships, or from the last step to its death), ``repeated``
(all of a step that had been made before) and ``idle`` (the rest).
"""


@dataclass(frozen=True)
class LedgerRecipe:
    prices_per_hour: dict[str, float] = field(default_factory=dict)
    """What an hour of one worker's device costs, by a part of the device's name ("RTX 4090"); the longest that fits."""
    currency: str = "$"
    """Of all prices; only printed."""
    electricity_per_kwh: float = 0.0
    """What a kilowatt-hour costs on top; counted for devices whose energy can be read."""

    def __post_init__(self) -> None:
        prices = {f"prices_per_hour.{name}": price for name, price in self.prices_per_hour.items()}
        for name, price in (prices | {"electricity_per_kwh": self.electricity_per_kwh}).items():
            if not 0 <= price < inf:
                raise UserError(f"ledger.{name} must be finite and not negative, not {price}.")

    def price_per_hour(self, device: str) -> float | None:
        """None where no price fits the device."""
        parts = [part for part in self.prices_per_hour if part.lower() in device.lower()]
        return self.prices_per_hour[max(parts, key=len)] if parts else None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a host did since its last record: one optimizer step, or an evaluation or a checkpoint after one.

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


@dataclass
class _Host:
    """What is known of a host; times in seconds since the run began."""

    node: str
    device: str
    joined: float
    booked: float  # its time until here is in `seconds`
    left: float | None = None
    membership: int | None = None  # index of the one it stepped in last, None before its first step
    present: float = 0.0  # seconds of earlier stays
    sequences: int = 0
    joules: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Takes in what happens and keeps the sums; times are seconds of the driver's monotonic clock.

    It never refuses what it is told, since an account must not end a run: a host or membership that it has not heard of
    begins with its first record, and a record that is not newer than its host's last changes nothing.

    Args:
        tokens_per_step: of the global batch.
        tokens_per_sequence: ``sequence_length``.
    """

    def __init__(self, tokens_per_step: int, tokens_per_sequence: int):
        self.tokens_per_step, self.tokens_per_sequence = tokens_per_step, tokens_per_sequence
        self._hosts: dict[str, _Host] = {}
        self._memberships: list[Membership] = []
        self._drivers: list[float] = [0.0]  # when each driver began, on the ledger's own clock that stops in between
        self._timeline = TimelineBins()
        self._end = 0.0
        self._index: dict[int, int] = {}  # of this driver's memberships, by number
        self._origin: float | None = None  # the driver's clock when it began
        self._starts: dict[str, tuple[Start, float, float]] = {}  # of this driver's hosts: from when to when

    def begin(self, at: float) -> None:
        """The driver begins; without this, with the first that it tells."""
        self._time(at)

    def joined(self, host: str, node: str, device: str, at: float) -> None:
        """The host was asked for; its ``start`` begins."""
        now = self._time(at)
        known = self._hosts.get(host)
        if known is None:
            self._hosts[host] = _Host(node, device, joined=now, booked=now)
        elif known.left is not None and now >= known.left:
            self._end_stay(host, known)
            known.node, known.device = node, device
            known.joined = known.booked = now
            known.left = known.membership = None

    def starting(self, host: str, replaces: bool, at: float) -> None:
        """A process for a host is started and takes its share of a machine; ``replaces`` one that was lost."""
        now = self._time(at)
        kind: Start = "replacement" if replaces or len(self._drivers) > 1 else "first"
        self._starts[host] = (kind, now, inf)

    def started(self, host: str, at: float) -> None:
        """The process is ready, or gone."""
        now = self._time(at)
        if host in self._starts:
            kind, since, _ = self._starts[host]
            self._starts[host] = (kind, since, now)

    def left(self, host: str, at: float) -> None:
        """The host died or was let go. Its records may still come in later."""
        now, known = self._time(at), self._hosts.get(host)
        if known is not None and known.left is None:
            known.left = max(now, known.booked)

    def membership(self, number: int, from_step: int, at: float) -> None:
        """A new group is formed, whose first step is ``from_step`` + 1."""
        now = self._time(at)
        if number not in self._index:
            self._index[number] = len(self._memberships)
            member = Membership(from_step, now, self._drivers[-1])
            if self._memberships:
                member.follow(self._memberships[-1])
            self._memberships.append(member)

    def record(self, record: StepRecord) -> None:
        """Book what a host did since its last record."""
        took = sum(record.seconds.values())
        self._time(record.ended - took)  # the first that a driver hears may be this
        ended = self._time(record.ended)
        if record.host not in self._hosts:
            self.joined(record.host, record.node, record.device, record.ended - took)
        if record.membership not in self._index:
            self.membership(record.membership, record.step - ("step" in record.seconds), record.ended - took)
        host, index = self._hosts[record.host], self._index[record.membership]
        member = self._memberships[index]
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
        for earlier, later in pairwise(self._memberships[index:]):  # news that comes late
            later.follow(earlier)

    def close(self, at: float) -> None:
        """Training is over: whoever is still there leaves."""
        for host in self._hosts:
            self.left(host, at)

    def figures(self, recipe: LedgerRecipe) -> Figures:
        """What it all comes to, so far."""
        workers = [self._worker(name, host, recipe) for name, host in self._hosts.items()]
        seconds: Counter[str] = Counter()
        for worker in workers:
            seconds.update(worker.seconds_of)
        total, made = seconds.total(), progress(self._memberships, self._end)
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
            restarts=len(made.restart_seconds),
            restart_seconds=statistics.median(made.restart_seconds) if made.restart_seconds else None,
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
        """Who did what when, for `doge.reporting.plots.plot_timeline`."""
        bins = deepcopy(self._timeline)
        for name, host in self._hosts.items():
            bins.add(name, self._tail_kind(host), host.booked, self._until(host))
        lanes = bins.lanes({name: (host.node, host.device) for name, host in self._hosts.items()})
        changes = [member.at for member in self._memberships[1:]]
        return Timeline(lanes, bins.bin_seconds, self._end, changes, self._drivers[1:])

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, for a later driver to go on from."""
        return {
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_sequence": self.tokens_per_sequence,
            "end": self._end,
            "drivers": self._drivers,
            "hosts": {name: asdict(host) for name, host in self._hosts.items()},
            "memberships": [deepcopy(vars(member)) for member in self._memberships],
            "timeline": self._timeline.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Ledger":
        """The ledger of a run that another driver goes on with. All hosts of the earlier one are gone."""
        ledger = cls(values["tokens_per_step"], values["tokens_per_sequence"])
        ledger._end = values["end"]
        ledger._drivers = [*values["drivers"], values["end"]]
        ledger._hosts = {name: _Host(**host) for name, host in values["hosts"].items()}
        ledger._memberships = [Membership(**member) for member in values["memberships"]]
        ledger._timeline = TimelineBins.from_dict(values["timeline"])
        for name, host in ledger._hosts.items():
            host.left = ledger._until(host)
            ledger._book(name, host, ledger._tail_kind(host), host.left)
        return ledger

    def _time(self, at: float) -> float:
        """The ledger's own time of a time of the driver's clock; the driver begins with what it tells first."""
        if self._origin is None:
            self._origin = at - self._drivers[-1]
        now = max(at - self._origin, self._drivers[-1])
        self._end = max(self._end, now)
        return now

    def _beside(self, start: float, ended: float) -> Start | None:
        """Whether a host started at that time."""
        kinds = {kind for kind, since, until in self._starts.values() if since < ended and start < until}
        return "replacement" if "replacement" in kinds else "first" if kinds else None

    def _book(self, name: str, host: _Host, kind: str, until: float) -> None:
        host.seconds[kind] = host.seconds.get(kind, 0.0) + until - host.booked
        self._timeline.add(name, kind, host.booked, until)
        host.booked = until

    def _gap(self, host: _Host, index: int) -> Kind:
        """What the time between two records was, the later one in the membership with ``index``."""
        if host.membership is None:
            return "start"
        return "restart" if index > host.membership else "idle"

    def _tail_kind(self, host: _Host) -> Kind:
        """What the time after a host's last record was: its last one, if the group went on in another membership."""
        last = next((at for at, m in enumerate(self._memberships) if m.at > self._until(host)), len(self._memberships))
        return self._gap(host, min(last, len(self._memberships) - 1))

    def _until(self, host: _Host) -> float:
        return max(self._end if host.left is None else host.left, host.booked)

    def _end_stay(self, name: str, host: _Host) -> None:
        self._book(name, host, self._tail_kind(host), self._until(host))
        host.present += host.booked - host.joined

    def _sharers(self, host: _Host) -> int:
        """Hosts that one energy counter counts: a GPU has its own, a node's CPU hosts have one together."""
        if not host.device.startswith("CPU"):
            return 1
        same = (h for h in self._hosts.values() if h.node == host.node and h.device.startswith("CPU"))
        return max(1, sum(h.left is None for h in same))

    def _worker(self, name: str, host: _Host, recipe: LedgerRecipe) -> WorkerFigures:
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
