"""The order of the training sequences: a pure function of (recipe, index).

    slot ──mixture──▶ (source, position) ──groups──▶ group ──permutation──▶ (file, part, row)

*Mixture.* A periodic table of 1,000 slots says which source serves a global slot; in every prefix each source is less
than one sequence away from its share. *Groups.* A source's files are taken in stripes of ``files_per_stripe``; part p
of every file of a stripe makes a group, in which a keyed permutation deals the rows. An index therefore needs only the
groups up to its own, however far tokenizing has got elsewhere. *Held out.* The first ``held_out_sequences`` slots are
no training: their rows are the first ones of each source's first groups under a permutation of their own, and training
deals only the rest, in every epoch.

No Ray, no torch, no files: what is known about shards comes from a catalog, a function
``(source, file, part) -> shard with .rows and .last, or None while it is not committed``.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import NamedTuple, Protocol

from doge.common.errors import UserError

SLOTS = 1000


class Shard(Protocol):
    """What the order must know of a committed shard: its sequences, and whether its file ends with it."""

    rows: int
    last: bool


Catalog = Callable[[str, int, int], Shard | None]


class Sample(NamedTuple):
    """Where a sequence lies: row ``row`` of the shard with part ``part`` of file number ``file`` of ``source``."""

    source: str
    file: int
    part: int
    row: int


class NotReady(Exception):
    """The order needs a shard that is not committed yet."""

    def __init__(self, source: str, file: int, part: int):
        super().__init__(f"part {part} of file {file} of source {source!r} is not prepared yet")
        self.source, self.file, self.part = source, file, part


def mixture_units(weights: Mapping[str, float]) -> dict[str, int]:
    """Slots of each source among ``SLOTS``, by largest remainder, sorted by name.

    Raises UserError for no source, a weight that is not positive, or one too small for a single slot.
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
    """Which source serves a global slot, and the how-manieth of that source it is; O(1) both ways.

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
        """(source, position within the source) of global slot ``slot``."""
        period, phase = divmod(slot, len(self._slots))
        source, position = self._slots[phase]
        return source, period * self.units[source] + position

    def count(self, source: str, slots: int) -> int:
        """How many of the first ``slots`` global slots ``source`` serves."""
        periods, phase = divmod(slots, len(self._slots))
        return periods * self.units[source] + self._before[source][phase]


def permute(index: int, size: int, *key) -> int:
    """Where a pseudorandom permutation of ``range(size)``, chosen by ``key``, sends ``index``.

    A Feistel network over pairs of digits in base ceil(sqrt(size)), walked until it lands inside the range: no table,
    constant memory, about one round trip a call. (Black and Rogaway 2002, "Ciphers with arbitrary finite domains")
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    base = _ceil_sqrt(size)
    keys = _round_keys(key)
    while True:
        left, right = divmod(index, base)
        for round_key in keys:
            left, right = right, (left + _mix(right ^ round_key)) % base
        index = left * base + right
        if index < size:
            return index


@lru_cache(maxsize=4096)
def _round_keys(key: tuple, rounds: int = 6) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * rounds).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(rounds))


@lru_cache(maxsize=4096)
def _ceil_sqrt(size: int) -> int:
    return isqrt(size - 1) + 1


def _mix(value: int) -> int:
    """The 64-bit finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def file_order(count: int, seed: int, source: str) -> list[int]:
    """The fixed order in which a source's ``count`` sorted files are used: a corpus is often sorted by date."""
    return [permute(index, count, seed, source, "files") for index in range(count)]


class _Group(NamedTuple):
    shards: list[tuple[int, int]]  # (file, part)
    ends: list[int]  # rows up to and including each shard
    held_out: int  # of those rows

    def row(self, index: int) -> tuple[int, int, int]:
        shard = bisect_right(self.ends, index)
        return *self.shards[shard], index - (self.ends[shard - 1] if shard else 0)


class SourceOrder:
    """One source's groups, as far as the catalog knows them. The known groups only ever grow."""

    def __init__(self, name: str, files: int, files_per_stripe: int, seed: int, held_out: int, catalog: Catalog):
        self.name, self.held_out, self._seed, self._catalog = name, held_out, seed, catalog
        self._stripes = [range(at, min(at + files_per_stripe, files)) for at in range(0, files, files_per_stripe)]
        self._groups: list[_Group] = []
        self._training_ends: list[int] = []
        self._held_out_ends: list[int] = []
        self._stripe, self._part = 0, 0
        self._open = list(self._stripes[0]) if self._stripes else []

    @property
    def finished(self) -> bool:
        """Whether every group of the source is known."""
        return self._stripe >= len(self._stripes)

    @property
    def training_rows(self) -> int:
        """Training sequences in the known groups: one epoch's, once ``finished``."""
        return self._training_ends[-1] if self._training_ends else 0

    @property
    def rows(self) -> int:
        """Sequences in the known groups, held-out ones included."""
        return self.training_rows + (self._held_out_ends[-1] if self._held_out_ends else 0)

    @property
    def next_group(self) -> list[tuple[int, int]]:
        """(file, part) of the shards that the next unknown group may consist of."""
        return [(file, self._part) for file in self._open]

    def following_stripes(self) -> Sequence[range]:
        """Files of the stripes after the one that the next unknown group belongs to."""
        return self._stripes[self._stripe + 1 :]

    def extend(self) -> None:
        """Get to know one more group; raises NotReady while one of its shards is missing."""
        shards, ends, still_open, rows = [], [], [], 0
        for file, part in self.next_group:
            shard = self._catalog(self.name, file, part)
            if shard is None:
                raise NotReady(self.name, file, part)
            rows += shard.rows
            shards.append((file, part))
            ends.append(rows)
            if not shard.last:
                still_open.append(file)
        known_held_out = self._held_out_ends[-1] if self._held_out_ends else 0
        taken = min(rows, self.held_out - known_held_out)
        self._groups.append(_Group(shards, ends, taken))
        self._held_out_ends.append(known_held_out + taken)
        self._training_ends.append(self.training_rows + rows - taken)
        self._open, self._part = still_open, self._part + 1
        if not still_open:
            self._stripe, self._part = self._stripe + 1, 0
            self._open = [] if self.finished else list(self._stripes[self._stripe])

    def training(self, position: int) -> Sample:
        """The ``position``-th training sequence of this source; past its end, the next epoch deals anew."""
        while position >= self.training_rows and not self.finished:
            self.extend()
        self._check_size()
        epoch, position = divmod(position, self.training_rows) if self.finished else (0, position)
        number = bisect_right(self._training_ends, position)
        group = self._groups[number]
        rows = group.ends[-1]
        index = position - (self._training_ends[number - 1] if number else 0)
        index = permute(index, rows - group.held_out, self._seed, self.name, number, epoch)
        if group.held_out:
            index = permute(group.held_out + index, rows, self._seed, self.name, number, "held out")
        return Sample(self.name, *group.row(index))

    def held_out_row(self, position: int) -> Sample:
        """The ``position``-th held-out sequence of this source."""
        while (self._held_out_ends[-1] if self._held_out_ends else 0) <= position and not self.finished:
            self.extend()
        self._check_size()
        number = bisect_right(self._held_out_ends, position)
        index = position - (self._held_out_ends[number - 1] if number else 0)
        group = self._groups[number]
        index = permute(index, group.ends[-1], self._seed, self.name, number, "held out")
        return Sample(self.name, *group.row(index))

    def _check_size(self) -> None:
        if self.finished and self.training_rows == 0:
            raise UserError(
                f"The source {self.name!r} holds {self.rows} sequences, all of which data.held_out_sequences takes "
                f"({self.held_out} are this source's share): lower it or add text."
            )


class Order:
    """Sample ``i`` of training and of the held-out set, for every ``i`` there will ever be.

    Args:
        units: slots of each source in the mixture's period, from `mixture_units`.
        files: number of files of each source.
        seed: of all permutations.
        held_out_sequences: size of the held-out set over all sources.
        files_per_stripe: files whose rows are mixed with one another.
        catalog: what is known about the shards.
    """

    def __init__(
        self,
        units: Mapping[str, int],
        files: Mapping[str, int],
        seed: int,
        held_out_sequences: int,
        files_per_stripe: int,
        catalog: Catalog,
    ):
        self.held_out_sequences = held_out_sequences
        self.mixture = Mixture(units)
        self.sources = {
            name: SourceOrder(
                name, files[name], files_per_stripe, seed, self.mixture.count(name, held_out_sequences), catalog
            )
            for name in units
        }

    def training(self, index: int) -> Sample:
        """Training sequence ``index``, from 0 without end. Raises NotReady while a shard it needs is missing."""
        source, position = self.mixture.locate(index + self.held_out_sequences)
        order = self.sources[source]
        return order.training(position - order.held_out)

    def held_out(self, index: int) -> Sample:
        """Held-out sequence ``index`` in ``range(held_out_sequences)``. Raises NotReady like `training`."""
        if not 0 <= index < self.held_out_sequences:
            raise IndexError(f"held-out sequence {index} is not in range({self.held_out_sequences})")
        source, position = self.mixture.locate(index)
        return self.sources[source].held_out_row(position)

    def rows_needed(self, source: str, training_sequences: int) -> int:
        """Rows of ``source`` that the held-out set and the first ``training_sequences`` need, epochs unfolded."""
        return self.mixture.count(source, self.held_out_sequences + training_sequences)
