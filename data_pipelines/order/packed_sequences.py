"""The packed training sequences of a committed plan as a feed: memory-mapped shards, read in the plan's order."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_pipelines.order.catalog import Catalog
from data_pipelines.order.feed import ReadAhead
from data_pipelines.order.order import NothingHeldOut, NotReady, Sample
from data_pipelines.order.patience import Patience
from data_pipelines.order.plan import load_plan
from data_pipelines.tokenizing.packing import model_inputs
from data_pipelines.tokenizing.shards import Damaged, OpenShard, open_shard, shard_name
from doge.common.errors import UserError
from doge.common.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN_SHARDS = 512  # kept mapped at a time
MESSAGE_INTERVAL = 30.0  # seconds between two messages of one wait

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Consecutive packed sequences; the arrays are (sequences, sequence_length).

    Args:
        tokens: token ids, padded at the end of a shard's last row.
        position_ids: 0 at the first token of every document, or piece of one.
        labels: the tokens (the model shifts them), -100 at every first token, untrained token and padding.
        samples: where each sequence lies.
    """

    tokens: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice, /) -> "Sequences":
        return Sequences(self.tokens[part], self.position_ids[part], self.labels[part], self.samples[part])


@dataclass(frozen=True)
class PackedSequencesConfig:
    """Opens `PackedSequences` in any process.

    Args:
        fingerprint: of the committed plan.
        held_out: the held-out sequences instead of the training ones.
    """

    fingerprint: str
    held_out: bool = False

    def open(
        self, storage: Storage, on_wait: Callable[[str], None], on_trouble: Callable[[str], None]
    ) -> "PackedSequences":
        """Open the feed. Raises UserError when the storage holds no such plan."""
        return PackedSequences(storage, self.fingerprint, self.held_out, on_wait, on_trouble)


class PackedSequences:
    """Feed of the training or the held-out sequences of a committed plan. Several threads may share one.

    Args:
        storage: holds the plan and the shards; a remote one is read through its local cache.
        plan_fingerprint: names the committed plan.
        held_out: read the held-out sequences instead of the training ones.
        on_wait: called with a sentence when a sequence is not prepared yet, and every 30 s until it is; with an empty
            one before every new attempt to read a storage that is away. Logs by default.
        on_trouble: called with a sentence when the storage cannot be read, and when it can again. Logs by default.
        poll_seconds: time between two looks for a shard that is not prepared yet.

    Raises:
        UserError: the storage holds no such plan.
    """

    def __init__(
        self,
        storage: Storage,
        plan_fingerprint: str,
        held_out: bool = False,
        on_wait: Callable[[str], None] = lambda message: _log.warning(message) if message else None,
        on_trouble: Callable[[str], None] = _log.warning,
        poll_seconds: float = 0.5,
    ):
        self.plan = load_plan(storage, plan_fingerprint)
        self.fingerprint = f"{plan_fingerprint}-held-out" if held_out else plan_fingerprint
        self.length = self.plan.recipe.held_out_sequences if held_out else None
        self._storage, self._on_wait, self._poll = storage, on_wait, poll_seconds
        self._patience = Patience(lambda: on_wait(""), on_trouble)
        self._catalog = Catalog(self.plan, storage)
        order = self.plan.order(self._catalog)
        self._find: Callable[[int], Sample] = order.held_out if held_out else order.training
        self._shards: OrderedDict[tuple[str, int, int], OpenShard] = OrderedDict()
        self._lock = threading.RLock()

    def read(self, start: int, stop: int, stopped: threading.Event | None = None) -> Sequences:
        """Read the sequences ``[start, stop)`` and wait for those that are not prepared yet, or a storage that is away.

        Held-out ones are left out where a source has fewer than its share.
        Where ``stopped`` is set meanwhile, the wait ends, and sequences may be missing.

        Raises:
            UserError: the preparation failed, or a damaged shard cannot be made again.
            StorageError: the storage was away for ten minutes.
            IndexError: there are fewer held-out sequences.
        """
        return self._read(start, stop, stopped or threading.Event())

    def prefetch(self, ranges: Iterable[tuple[int, int]], depth: int = 2) -> ReadAhead[Sequences]:
        """Read each range in turn in a background thread, up to ``depth`` ranges ahead."""
        return ReadAhead(self._read, ranges, depth)

    def cost(self, unit: int) -> float:
        """1.0, since all packed sequences are equally long."""
        return 1.0

    def _read(self, start: int, stop: int, stopped: threading.Event) -> Sequences:
        """The sequences ``[start, stop)``; fewer if ``stopped`` is set while waiting for one of them."""
        samples = []
        for index in range(start, stop):
            with suppress(NothingHeldOut):
                sample = self._wait_for(index, stopped)
                if sample is None:
                    break
                samples.append(sample)
        return self._load(samples, stopped)

    def _wait_for(self, index: int, stopped: threading.Event) -> Sample | None:
        """The sample of ``index`` as soon as it is known; None if ``stopped`` is set before."""
        started, told = time.monotonic(), -MESSAGE_INTERVAL
        while not stopped.is_set():
            try:
                return self._patience.read(lambda: self._sample(index), stopped)
            except NotReady as missing:
                self._patience.read(self._raise_failure, stopped)
                waited = time.monotonic() - started
                if waited - told >= MESSAGE_INTERVAL:
                    told = waited
                    self._on_wait(f"Waiting for data: {missing} ({waited:.0f} s so far).")
                stopped.wait(self._poll)
        return None

    def _sample(self, index: int) -> Sample:
        with self._lock:
            return self._find(index)

    def _raise_failure(self) -> None:
        try:
            message = self._storage.read_bytes(f"plans/{self.plan.fingerprint}.failed").decode()
        except FileNotFoundError:
            return
        raise UserError(message)

    def _load(self, samples: list[Sample], stopped: threading.Event) -> Sequences:
        width = self.plan.recipe.sequence_length
        tokens = np.empty((len(samples), width), np.int64)
        trained = np.ones((len(samples), width), np.uint8)
        lengths = np.empty(len(samples), np.int64)
        starts = []
        for at, sample in enumerate(samples):
            shard = self._patience.read(partial(self._shard, *sample[:3]), stopped)
            tokens[at], starts_of_row, lengths[at], trained_of_row = shard.row(sample.row)
            if trained_of_row is not None:
                trained[at] = trained_of_row
            starts.append(starts_of_row)
        return Sequences(tokens, *model_inputs(tokens, starts, lengths, trained), samples)

    def _shard(self, source: str, file: int, part: int) -> OpenShard:
        address = (source, file, part)
        with self._lock:
            shard = self._shards.get(address)
            if shard is None:
                shard = self._shards[address] = self._open(*address)
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(address)
            return shard

    def _open(self, source: str, file: int, part: int) -> OpenShard:
        """Open a committed shard; a damaged copy is fetched again, a damaged original made again."""
        record = self._catalog(source, file, part)
        if record is None:
            raise RuntimeError(f"part {part} of file {file} of {source!r} is in the order but not in the catalog")
        name = shard_name(self.plan.keys[source][file], part)
        try:
            with self._storage.reading(name) as path:
                return open_shard(path, record)
        except (Damaged, FileNotFoundError):
            self._storage.forget(name)
        try:
            with self._storage.reading(name) as path:
                return open_shard(path, record)
        except (Damaged, FileNotFoundError):
            self._remake(source, file, part, record.sha256)
        with self._storage.reading(name) as path:
            return open_shard(path, record)

    def _remake(self, source: str, file: int, part: int, sha256: str) -> None:
        path = self._storage.path(shard_name(self.plan.keys[source][file], part))
        _log.warning("%s is damaged and is made again.", path)
        again = self.plan.make_shard(self._storage, source, file, part, self._tokenizer)
        self._storage.forget(shard_name(self.plan.keys[source][file], part))
        if again is None or again.sha256 != sha256:
            raise UserError(
                f"{path} was damaged and cannot be made again as it was (a library has changed): restore the file or "
                "start a new run under another storage root."
            )

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        return self.plan.open_tokenizer(self._storage)
