"""The order of the training sequences: a pure function of (recipe, index).

    slot ──mixture──▶ (source, position) ──groups──▶ group ──permutation──▶ (file, part, row)

*Mixture.* A periodic table of 1,000 slots says which source serves a global slot; in every prefix each source is less
than one sequence away from its share. *Groups.* A source's files are taken in stripes of ``files_per_stripe``; part p
of every file of a stripe makes a group, in which a keyed permutation deals the rows. An index therefore needs only the
groups up to its own, however far tokenizing has got elsewhere. *Held out.* The first ``held_out_sequences`` slots are
not trained on: their rows are the first ones of each source's first groups under a permutation of their own, and
training deals only the rest, in every epoch.

No Ray, no torch, no files: a function ``find_shard(source, file, part)`` says what is known about a shard.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from data_pipelines.order.mixture import Mixture
from data_pipelines.order.permutation import permute
from doge.common.errors import UserError


class Shard(Protocol):
    """The facts about a committed shard that the order depends on."""

    @property
    def rows(self) -> int:
        """Sequences of the shard."""

    @property
    def last(self) -> bool:
        """Whether the input file ends with this shard."""


FindShard = Callable[[str, int, int], Shard | None]  # (source, file, part); None while it is not committed


class Sample(NamedTuple):
    """The place of a sequence: row ``row`` of the shard of part ``part`` of file number ``file`` of ``source``."""

    source: str
    file: int
    part: int
    row: int


class NotReady(Exception):
    """The order needs a shard that is not committed yet."""

    def __init__(self, source: str, file: int, part: int):
        super().__init__(f"part {part} of file {file} of source {source!r} is not prepared yet")
        self.source, self.file, self.part = source, file, part


class _Group(NamedTuple):
    shards: list[tuple[int, int]]  # (file, part)
    ends: list[int]  # rows up to and including each shard
    held_out: int  # of those rows

    def row(self, index: int) -> tuple[int, int, int]:
        shard = bisect_right(self.ends, index)
        return *self.shards[shard], index - (self.ends[shard - 1] if shard else 0)


class SourceOrder:
    """One source's groups as far as its shards are committed. The known groups only ever grow."""

    def __init__(self, name: str, files: int, files_per_stripe: int, seed: int, held_out: int, find_shard: FindShard):
        self.name, self.held_out, self._seed, self._find_shard = name, held_out, seed, find_shard
        self._stripes = [range(at, min(at + files_per_stripe, files)) for at in range(0, files, files_per_stripe)]
        self._groups: list[_Group] = []
        self._training_ends: list[int] = []
        self._held_out_ends: list[int] = []
        self._stripe, self._part = 0, 0
        self._open = list(self._stripes[0]) if self._stripes else []

    @property
    def finished(self) -> bool:
        """True once every group of the source is known."""
        return self._stripe >= len(self._stripes)

    @property
    def training_rows(self) -> int:
        """Training sequences in the known groups: those of one epoch, once ``finished``."""
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
        """The files of each stripe after the one that the next unknown group belongs to."""
        return self._stripes[self._stripe + 1 :]

    def extend(self) -> None:
        """Learn one more group. Raises NotReady while one of its shards is missing."""
        shards, ends, still_open, rows = [], [], [], 0
        for file, part in self.next_group:
            shard = self._find_shard(self.name, file, part)
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
        """Locate the ``position``-th training sequence of this source; each epoch deals the rows anew."""
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
        """Locate the ``position``-th held-out sequence of this source."""
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
                f"The source {self.name!r} holds {self.rows} sequences, and its share of data.held_out_sequences "
                f"({self.held_out}) leaves none to train on: lower data.held_out_sequences or add text."
            )


class Order:
    """Locates training sequence ``i``, for every ``i`` without end, and held-out sequence ``i``.

    Args:
        units: slots of each source in the mixture's period, from `mixture_units`.
        files: number of files of each source.
        seed: seed of all permutations.
        held_out_sequences: size of the held-out set over all sources.
        files_per_stripe: number of files whose rows are mixed with one another.
        find_shard: looks a shard up by (source, file, part).
    """

    def __init__(
        self,
        units: Mapping[str, int],
        files: Mapping[str, int],
        seed: int,
        held_out_sequences: int,
        files_per_stripe: int,
        find_shard: FindShard,
    ):
        self.held_out_sequences = held_out_sequences
        self.mixture = Mixture(units)
        self.sources = {
            name: SourceOrder(
                name, files[name], files_per_stripe, seed, self.mixture.count(name, held_out_sequences), find_shard
            )
            for name in units
        }

    def training(self, index: int) -> Sample:
        """Locate training sequence ``index``, from 0 without end. Raises NotReady while a shard is missing."""
        source, position = self.mixture.locate(index + self.held_out_sequences)
        order = self.sources[source]
        return order.training(position - order.held_out)

    def held_out(self, index: int) -> Sample:
        """Locate held-out sequence ``index``.

        Raises:
            NotReady: a shard is missing.
            IndexError: ``index`` is not in ``range(held_out_sequences)``.
        """
        if not 0 <= index < self.held_out_sequences:
            raise IndexError(f"held-out sequence {index} is not in range({self.held_out_sequences})")
        source, position = self.mixture.locate(index)
        return self.sources[source].held_out_row(position)

    def rows_needed(self, source: str, training_sequences: int) -> int:
        """Count the rows of ``source`` that the held-out set and ``training_sequences`` need, repeated ones too."""
        return self.mixture.count(source, self.held_out_sequences + training_sequences)
