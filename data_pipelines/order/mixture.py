"""The mixture: which source serves a global slot, by a periodic table of 1,000 slots."""

from collections.abc import Mapping
from fractions import Fraction

from doge.common.errors import UserError

SLOTS = 1000


def mixture_units(weights: Mapping[str, float]) -> dict[str, int]:
    """Share out ``SLOTS`` slots over the sources by largest remainder, sorted by name.

    Raises:
        UserError: there is no source, a weight is not positive, or one is too small for a single slot.
    """
    if not weights:
        raise UserError("data.sources is empty: name at least one source.")
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(f"data.sources.{name}.weight must be a positive number, not {weight}.")
    names = sorted(weights)
    total = sum(weights.values())
    shares = {name: weights[name] / total * SLOTS for name in names}
    units = {name: int(shares[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: (units[name] - shares[name], name))
    for name in by_remainder[: SLOTS - sum(units.values())]:
        units[name] += 1
    for name, count in units.items():
        if count == 0:
            raise UserError(
                f"data.sources.{name}.weight {weights[name]} is below 1/{SLOTS} of the total {total:g}: raise it or "
                "remove the source."
            )
    return units


class Mixture:
    """Maps a slot to (source, index within the source), and counts a source's slots, both in O(1).

    The table solves the chairman assignment problem (Tijdeman 1980): among the sources that are behind by at least
    1/(2k-2), the one whose deadline comes first is served; no prefix is then off by more than 1 - 1/(2k-2).
    """

    def __init__(self, units: Mapping[str, int]):
        self.units = dict(units)
        names, period = list(units), sum(units.values())
        # Both sides are scaled by period * scale, so that all arithmetic is on integers; delta = 1 / scale.
        scale = max(1, 2 * len(names) - 2)
        counts = dict.fromkeys(names, 0)
        self._slots: list[tuple[str, int]] = []
        self._before: dict[str, list[int]] = {name: [0] for name in names}
        for step in range(1, period + 1):
            behind = {name: scale * (units[name] * step - period * counts[name]) for name in names}
            due = [name for name in names if behind[name] >= period] if len(names) > 1 else names
            chosen = min(due, key=lambda name: (Fraction((scale - 1) * period - behind[name], units[name]), name))
            self._slots.append((chosen, counts[chosen]))
            counts[chosen] += 1
            for name in names:
                self._before[name].append(counts[name])

    def locate(self, slot: int) -> tuple[str, int]:
        """Map a global slot to (source, position within the source)."""
        period, phase = divmod(slot, len(self._slots))
        source, position = self._slots[phase]
        return source, period * self.units[source] + position

    def count(self, source: str, slots: int) -> int:
        """Count those of the first ``slots`` global slots that ``source`` serves."""
        periods, phase = divmod(slots, len(self._slots))
        return periods * self.units[source] + self._before[source][phase]
