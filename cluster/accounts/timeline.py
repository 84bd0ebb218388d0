"""The timeline of a run in bounded memory: equal bins that double in width as the run grows."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["start", "step", "data", "others", "checkpoint", "evaluation", "restart", "repeated", "idle"]
"""Kind of a worker's time.

A worker posts ``step`` (computing its share and updating), ``data`` (waiting for data), ``others`` (waiting for other
workers), ``checkpoint`` (the stall of gathering state) and ``evaluation``. The ledger derives ``start`` (from being
asked for to the first step), ``restart`` (between two memberships, or from the last step to its death), ``repeated``
(all of a step that had been made before) and ``idle`` (the rest).
"""

KINDS: dict[Kind, tuple[str, str]] = {
    "step": ("step", "#3a9a6c"),
    "data": ("waiting for data", "#f0b429"),
    "others": ("waiting for others", "#8fc1e3"),
    "checkpoint": ("checkpoint", "#8d6cab"),
    "evaluation": ("evaluation", "#2f6690"),
    "repeated": ("repeated step", "#f08a9d"),
    "restart": ("restart", "#cf3b4a"),
    "start": ("starting", "#8a8f98"),
    "idle": ("idle", "#dfe2e6"),
}
"""Each kind's label and color in a plot, from the bottom of a lane to the top: work, usual stalls, losses."""

MAX_BINS = 1200
_FIRST_BIN_SECONDS = 1 / 64


@dataclass(frozen=True)
class Lane:
    """One line of a timeline: hosts of one node that were there one after another.

    Args:
        node: Name of the node.
        device: Device of the last host.
        hosts: Names of the hosts.
        shares: Kind → number of a bin → the part of the bin that it took, between 0 and 1.
    """

    node: str
    device: str
    hosts: tuple[str, ...]
    shares: Mapping[str, Mapping[int, float]]

    @property
    def label(self) -> str:
        return " → ".join(self.hosts) if len(self.hosts) < 3 else f"{self.hosts[0]} → … → {self.hosts[-1]}"


@dataclass(frozen=True)
class Timeline:
    """The timeline of a run; times in seconds since it began.

    Args:
        lanes: The lanes, those of a node next to each other.
        bin_seconds: Width of a bin.
        end: End of the run.
        changes: How often the group of workers changed.
        marks: Times at which it did, one for each bin.
        gaps: Times at which one driver stopped and a later one continued.
    """

    lanes: Sequence[Lane]
    bin_seconds: float
    end: float
    changes: int
    marks: Sequence[float]
    gaps: Sequence[float]

    def drawing(self) -> dict[str, Any]:
        """The keyword arguments of `plot_lanes` that draw it, grouped by node."""
        nodes: dict[str, list[Lane]] = {}
        for lane in self.lanes:
            nodes.setdefault(lane.node, []).append(lane)
        return {
            "groups": {
                f"{node} · {', '.join(sorted({lane.device for lane in lanes}))}": [
                    (lane.label, lane.shares) for lane in lanes
                ]
                for node, lanes in nodes.items()
            },
            "kinds": KINDS,
            "bin_seconds": self.bin_seconds,
            "end": self.end,
            "changes": (f"change of the group ({self.changes})", self.marks),
            "breaks": ("stopped, then continued", self.gaps),
        }


class TimelineBins:
    """Seconds of every kind in every bin of every host. A host costs memory only for the bins in which it was there."""

    def __init__(self) -> None:
        self.bin_seconds = _FIRST_BIN_SECONDS
        self.changes = 0
        self._hosts: dict[str, dict[str, dict[int, float]]] = {}  # host → kind → bin → seconds
        self._marks: dict[int, float] = {}  # bin → time of a change in it

    def add(self, host: str, kind: str, start: float, stop: float) -> None:
        """Book ``host``'s time from ``start`` to ``stop``, in seconds since the run began."""
        if stop <= start:
            return
        self._reach(stop)
        width = self.bin_seconds
        bins = self._hosts.setdefault(host, {}).setdefault(kind, {})
        at = int(start / width)
        while start < stop:
            end = min(stop, (at + 1) * width)
            bins[at] = bins.get(at, 0.0) + end - start
            start, at = end, at + 1

    def mark(self, at: float) -> None:
        """Note that the group of workers changed at that time."""
        self._reach(at)
        self.changes += 1
        self._marks.setdefault(int(at / self.bin_seconds), at)

    @property
    def marks(self) -> list[float]:
        """The times of the changes, one for each bin."""
        return list(self._marks.values())

    def join(self, host: str, other: str) -> bool:
        """Book ``host``'s time as ``other``'s, if it fits into its lane; whether it did."""
        into = self._hosts.setdefault(other, {})
        if not self._fits(self._filled(host), self._filled(other)):
            return False
        for kind, bins in self._hosts.pop(host, {}).items():
            sums = into.setdefault(kind, {})
            for at, seconds in bins.items():
                sums[at] = sums.get(at, 0.0) + seconds
        return True

    def lanes(self, places: Mapping[str, tuple[str, str, Sequence[str]]]) -> list[Lane]:
        """The hosts of every node in as few lanes as hold them: one that came for one that went takes its lane.

        Args:
            places: each host's node and device, and the names that its lane shows.
        """
        packed: dict[str, list[tuple[list[str], Counter[int]]]] = {}  # node → (hosts of a lane, how they fill the bins)
        filled = {host: self._filled(host) for host in self._hosts}
        for host in sorted(filled, key=lambda host: (min(filled[host]), _natural(host))):
            own, lanes = filled[host], packed.setdefault(places[host][0], [])
            for hosts, taken in lanes:
                if self._fits(own, taken):
                    hosts.append(host)
                    taken.update(own)
                    break
            else:
                lanes.append(([host], own))
        return [self._lane(node, hosts, places) for node in sorted(packed, key=_natural) for hosts, _ in packed[node]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: of each bin its number and the thousandths that a kind took."""
        unit = self.bin_seconds / 1000
        hosts = {
            host: {kind: [[at, round(seconds / unit)] for at, seconds in bins.items()] for kind, bins in kinds.items()}
            for host, kinds in self._hosts.items()
        }
        return {"bin_seconds": self.bin_seconds, "changes": self.changes, "marks": self.marks, "hosts": hosts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TimelineBins":
        bins = cls()
        bins.bin_seconds, bins.changes = values["bin_seconds"], values["changes"]
        bins._marks = {int(at / bins.bin_seconds): at for at in values["marks"]}
        unit = bins.bin_seconds / 1000
        bins._hosts = {
            host: {kind: {at: parts * unit for at, parts in pairs} for kind, pairs in kinds.items()}
            for host, kinds in values["hosts"].items()
        }
        return bins

    def _filled(self, host: str) -> Counter[int]:
        """Seconds that the host was there in every bin."""
        filled: Counter[int] = Counter()
        for bins in self._hosts.get(host, {}).values():
            filled.update(bins)
        return filled

    def _fits(self, own: Counter[int], taken: Counter[int]) -> bool:
        """Whether a host fits into a lane: they may share the bin of a change, not be there at once."""
        most = self.bin_seconds * 1.02
        return all(own[at] + taken[at] <= most for at in own.keys() & taken.keys())

    def _reach(self, time: float) -> None:
        while time > MAX_BINS * self.bin_seconds:
            self._widen()

    def _widen(self) -> None:
        self.bin_seconds *= 2
        self._marks = {at // 2: time for at, time in self._marks.items()}
        for kinds in self._hosts.values():
            for kind, bins in kinds.items():
                wider: dict[int, float] = {}
                for at, seconds in bins.items():
                    wider[at // 2] = wider.get(at // 2, 0.0) + seconds
                kinds[kind] = wider

    def _lane(self, node: str, hosts: list[str], places: Mapping[str, tuple[str, str, Sequence[str]]]) -> Lane:
        shares: dict[str, dict[int, float]] = {}
        for host in hosts:
            for kind, bins in self._hosts[host].items():
                share = shares.setdefault(kind, {})
                for at, seconds in bins.items():
                    share[at] = share.get(at, 0.0) + seconds / self.bin_seconds
        names = tuple(name for host in hosts for name in places[host][2])
        return Lane(node, places[hosts[-1]][1], names, shares)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts node-2 before node-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
