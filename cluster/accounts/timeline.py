"""Who did what when, in bounded memory: equal bins that double in width as a run grows."""

import re
from collections.abc import Mapping
from typing import Any

from doge.reporting.plots import Lane

MAX_BINS = 1200
_FIRST_BIN_SECONDS = 1 / 64


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
    """Sorts node-2 before node-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
