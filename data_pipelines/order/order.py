"""The order of the training sequences: a pure function of (recipe, index).

    slot ──mixture──▶ (source, position) ──groups──▶ group ──permutation──▶ (file, part, row)

*Mixture.* A periodic table of 1,000 slots says which source serves a global slot; in every prefix each source is less
than one sequence away from its share. *Groups.* A source's files are taken in stripes of ``files_per_stripe``; part p
of every file of a stripe makes a group, in which a keyed permutation deals the rows. An index therefore needs only the
groups up to its own, however far tokenizing has got elsewhere. *Held out.* A shard has its held-out documents in rows
of their own, behind the others, which training never deals. Slots of the same mixture and groups of the same kind say
which of them make the held-out set.

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
        """Sequences that are trained on."""

    @property
    def held_out_rows(self) -> int:
        """Sequences of held-out documents, behind those."""

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


class NothingHeldOut(LookupError):
    """A source holds fewer sequences out than its share of the held-out set."""


class _Group(NamedTuple):
    shards: list[tuple[int, int]]  # (file, part)
    ends: list[int]  # training rows up to and including each shard
    held_out_ends: list[int]  # held-out rows, likewise

    def row(self, index: int) -> tuple[int, int, int]:
        shard = bisect_right(self.ends, index)
        return *self.shards[shard], index - _before(self.ends, shard)

    def held_out_row(self, index: int) -> tuple[int, int, int]:
        shard = bisect_right(self.held_out_ends, index)
        trained = self.ends[shard] - _before(self.ends, shard)
        return *self.shards[shard], trained + index - _before(self.held_out_ends, shard)


def _before(ends: list[int], place: int) -> int:
    return ends[place - 1] if place else 0


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
    def held_out_rows(self) -> int:
        """Held-out sequences in the known groups."""
        return self._held_out_ends[-1] if self._held_out_ends else 0

    def has(self, training_rows: float) -> bool:
        """Whether the known groups hold so many training sequences and the whole held-out set, or all that there is."""
        return self.finished or (self.training_rows >= training_rows and self.has_held_out)

    @property
    def has_held_out(self) -> bool:
        """Whether the known groups hold this source's share of the held-out set."""
        return self.held_out_rows >= self.held_out

    @property
    def next_group(self) -> list[tuple[int, int]]:
        """(file, part) of the shards that the next unknown group may consist of."""
        return [(file, self._part) for file in self._open]

    def following_stripes(self) -> Sequence[range]:
        """The files of each stripe after the one that the next unknown group belongs to."""
        return self._stripes[self._stripe + 1 :]

    def extend(self) -> None:
        """Learn one more group. Raises NotReady while one of its shards is missing."""
        group, still_open = _Group([], [], []), []
        for file, part in self.next_group:
            shard = self._find_shard(self.name, file, part)
            if shard is None:
                raise NotReady(self.name, file, part)
            group.shards.append((file, part))
            group.ends.append(shard.rows + _before(group.ends, len(group.ends)))
            group.held_out_ends.append(shard.held_out_rows + _before(group.held_out_ends, len(group.held_out_ends)))
            if not shard.last:
                still_open.append(file)
        self._groups.append(group)
        self._training_ends.append(self.training_rows + group.ends[-1])
        self._held_out_ends.append(self.held_out_rows + group.held_out_ends[-1])
        self._open, self._part = still_open, self._part + 1
        if not still_open:
            self._stripe, self._part = self._stripe + 1, 0
            self._open = [] if self.finished else list(self._stripes[self._stripe])
        self._check_size()

    def training(self, position: int) -> Sample:
        """Locate the ``position``-th training sequence of this source; each epoch deals the rows anew."""
        while position >= self.training_rows and not self.finished:
            self.extend()
        self._check_size()
        epoch, position = divmod(position, self.training_rows) if self.finished else (0, position)
        number = bisect_right(self._training_ends, position)
        group, index = self._groups[number], position - _before(self._training_ends, number)
        return Sample(self.name, *group.row(permute(index, group.ends[-1], self._seed, self.name, number, epoch)))

    def held_out_row(self, position: int) -> Sample:
        """Locate the ``position``-th held-out sequence of this source. Raises NothingHeldOut if there are fewer."""
        while self.held_out_rows <= position and not self.finished:
            self.extend()
        if position >= self.held_out_rows:
            raise NothingHeldOut(self.name)
        number = bisect_right(self._held_out_ends, position)
        group, index = self._groups[number], position - _before(self._held_out_ends, number)
        index = permute(index, group.held_out_ends[-1], self._seed, self.name, number, "held out")
        return Sample(self.name, *group.held_out_row(index))

    def _check_size(self) -> None:
        if self.finished and self.training_rows == 0:
            raise UserError(
                f"The source {self.name!r} has no sequence to train on ({self.held_out_rows} are held out): lower "
                "data.held_out_fraction or add text."
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
        source, position = self.mixture.locate(index)
        return self.sources[source].training(position)

    def held_out(self, index: int) -> Sample:
        """Locate held-out sequence ``index``.

        Raises:
            NotReady: a shard is missing.
            NothingHeldOut: its source has fewer.
            UserError: no source has any.
            IndexError: ``index`` is not in ``range(held_out_sequences)``.
        """
        if not 0 <= index < self.held_out_sequences:
            raise IndexError(f"held-out sequence {index} is not in range({self.held_out_sequences})")
        source, position = self.mixture.locate(index)
        try:
            return self.sources[source].held_out_row(position)
        except NothingHeldOut:
            self.check_held_out()
            raise

    def check_held_out(self) -> None:
        """Raise UserError if it is known that no source holds any sequence out, although some are wanted."""
        sources = self.sources.values()
        if self.held_out_sequences and all(source.finished and not source.held_out_rows for source in sources):
            raise UserError(
                "No document of any source is held out, and data.held_out_sequences is "
                f"{self.held_out_sequences}: raise data.held_out_fraction, add text, or set that to 0."
            )

    def rows_needed(self, source: str, training_sequences: int) -> int:
        """Count the training rows of ``source`` among ``training_sequences``, repeated ones too."""
        return self.mixture.count(source, training_sequences)
