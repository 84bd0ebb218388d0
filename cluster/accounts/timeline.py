"""The timeline of a run in bounded memory: equal bins that double in width as the run grows."""

import re
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
        changes: Times at which the group of workers changed.
        gaps: Times at which one driver stopped and a later one continued.
    """

    lanes: Sequence[Lane]
    bin_seconds: float
    end: float
    changes: Sequence[float]
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
            "changes": (f"change of the group ({len(self.changes)})", self.changes),
            "breaks": ("stopped, then continued", self.gaps),
        }


class TimelineBins:
    """Seconds of every kind in every bin of every host. A host costs memory only for the bins in which it was there."""

    def __init__(self) -> None:
        self.bin_seconds = _FIRST_BIN_SECONDS
        self._hosts: dict[str, dict[str, dict[int, float]]] = {}  # host → kind → bin → seconds

    def add(self, host: str, kind: str, start: float, stop: float) -> None:
        """Book ``host``'s time from ``start`` to ``stop``, in seconds since the run began."""
        if stop <= start:
            return
        while stop > MAX_BINS * self.bin_seconds:
            self._widen()
        width = self.bin_seconds
        bins = self._hosts.setdefault(host, {}).setdefault(kind, {})
        at = int(start / width)
        while start < stop:
            end = min(stop, (at + 1) * width)
            bins[at] = bins.get(at, 0.0) + end - start
            start, at = end, at + 1

    def lanes(self, places: Mapping[str, tuple[str, str]]) -> list[Lane]:
        """The hosts of every node in as few lanes as hold them: one that came for one that went takes its lane.

        Args:
            places: each host's node and device.
        """
        packed: dict[str, list[tuple[list[str], set[int]]]] = {}  # node → (hosts of a lane, the bins they fill)
        filled = {host: set().union(*kinds.values()) for host, kinds in self._hosts.items()}
        for host in sorted(filled, key=lambda host: (min(filled[host]), _natural(host))):
            own, lanes = filled[host], packed.setdefault(places[host][0], [])
            for hosts, taken in lanes:
                if len(own & taken) <= min(1, len(own) - 1):  # the bin of the change they may share
                    hosts.append(host)
                    taken |= own
                    break
            else:
                lanes.append(([host], set(own)))
        return [self._lane(node, hosts, places) for node in sorted(packed, key=_natural) for hosts, _ in packed[node]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: of each bin its number and the thousandths that a kind took."""
        unit = self.bin_seconds / 1000
        hosts = {
            host: {kind: [[at, round(seconds / unit)] for at, seconds in bins.items()] for kind, bins in kinds.items()}
            for host, kinds in self._hosts.items()
        }
        return {"bin_seconds": self.bin_seconds, "hosts": hosts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TimelineBins":
        bins = cls()
        bins.bin_seconds = values["bin_seconds"]
        unit = bins.bin_seconds / 1000
        bins._hosts = {
            host: {kind: {at: parts * unit for at, parts in pairs} for kind, pairs in kinds.items()}
            for host, kinds in values["hosts"].items()
        }
        return bins

    def _widen(self) -> None:
        self.bin_seconds *= 2
        for kinds in self._hosts.values():
            for kind, bins in kinds.items():
                wider: dict[int, float] = {}
                for at, seconds in bins.items():
                    wider[at // 2] = wider.get(at // 2, 0.0) + seconds
                kinds[kind] = wider

    def _lane(self, node: str, hosts: list[str], places: Mapping[str, tuple[str, str]]) -> Lane:
        shares: dict[str, dict[int, float]] = {}
        for host in hosts:
            for kind, bins in self._hosts[host].items():
                share = shares.setdefault(kind, {})
                for at, seconds in bins.items():
                    share[at] = share.get(at, 0.0) + seconds / self.bin_seconds
        return Lane(node, places[hosts[-1]][1], tuple(hosts), shares)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts node-2 before node-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
