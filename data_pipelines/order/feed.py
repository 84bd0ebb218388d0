"""Sequences by number, for the workers: memory-mapped shards, read in the plan's order, waited for if need be.

reader = Reader(storage, plan_fingerprint)
for batch in reader.prefetch((start, stop) for each step):
    ...
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipelines.order.order import NotReady, Sample
from data_pipelines.order.plan import Catalog, load_plan
from data_pipelines.tokenizing.packing import model_inputs
from data_pipelines.tokenizing.shards import Damaged, OpenShard, open_shard, shard_name
from doge.common.errors import UserError
from doge.common.storage import Storage

OPEN_SHARDS = 512  # kept mapped at a time
MESSAGE_INTERVAL = 30.0  # seconds between two messages of one wait

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Consecutive sequences; arrays are (sequences, sequence_length) int64.

    Attributes:
        tokens: ids, padded at the end of a shard's last row.
        position_ids: 0 at the first token of every document or piece of one.
        labels: the tokens (the model shifts them), -100 at every first token and at padding.
        samples: where each sequence lies.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    samples: list[Sample]


class ReadAhead(Iterator[Batch]):
    """Batches that a thread of its own reads ahead; its errors are raised where they are taken. Close it.

    Args:
        read: reads a range, and gives up once the event is set.
        ranges: of sequences, a batch each.
        depth: the most batches that lie ready.
    """

    def __init__(
        self,
        read: Callable[[int, int, threading.Event], Batch | None],
        ranges: Iterable[tuple[int, int]],
        depth: int,
    ):
        self._read, self._ranges = read, ranges
        self._ready: deque[Batch | BaseException] = deque()
        self._depth = depth
        self._change = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._stopped.is_set())
            if self._stopped.is_set():
                raise RuntimeError("Reading ahead was stopped.")
            item = self._ready[0] if isinstance(self._ready[0], BaseException) else self._ready.popleft()
            self._change.notify_all()
        if isinstance(item, BaseException):
            self._thread.join()
            raise item
        return item

    def stop(self) -> None:
        """From any thread: nobody waits for a batch any more; who does gets a RuntimeError."""
        with self._change:
            self._stopped.set()
            self._change.notify_all()

    def close(self) -> None:
        """Stop, and wait for the end of the thread."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        try:
            for start, stop in self._ranges:
                batch = self._read(start, stop, self._stopped)
                if not self._put(batch):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Lay an item down when there is room; whether anybody still wants it."""
        with self._change:
            self._change.wait_for(lambda: len(self._ready) < self._depth or self._stopped.is_set())
            if not self._stopped.is_set():
                self._ready.append(item)
                self._change.notify_all()
            return not self._stopped.is_set()


class Reader:
    """Reads the training and held-out sequences of a committed plan. Threads may share one.

    Args:
        storage: where plan and shards lie; shards of a remote one are read through its local cache.
        fingerprint: of the plan.
        on_wait: is called with a sentence when a sequence is not prepared yet, and every 30 s until it is; logged by
            default.
        poll_seconds: between two looks for a shard that is not prepared yet.
    """

    def __init__(
        self,
        storage: Storage,
        fingerprint: str,
        on_wait: Callable[[str], None] = _log.warning,
        poll_seconds: float = 0.5,
    ):
        self.plan = load_plan(storage, fingerprint)
        self._storage, self._on_wait, self._poll = storage, on_wait, poll_seconds
        self._catalog = Catalog(self.plan, storage)
        self._order = self.plan.order(self._catalog)
        self._shards: OrderedDict[tuple[str, int, int], OpenShard] = OrderedDict()
        self._lock = threading.RLock()

    def read(self, start: int, stop: int) -> Batch:
        """Training sequences ``[start, stop)`` by global index, waiting for those that are not prepared yet.

        Raises UserError when the preparation failed or a damaged shard cannot be made again.
        """
        return self._batch([self._wait_for(self._order.training, index) for index in range(start, stop)])

    def read_held_out(self, start: int, stop: int) -> Batch:
        """Held-out sequences ``[start, stop)`` within ``range(data.held_out_sequences)``."""
        return self._batch([self._wait_for(self._order.held_out, index) for index in range(start, stop)])

    def prefetch(self, ranges: Iterable[tuple[int, int]], depth: int = 2) -> "ReadAhead":
        """`read` of each range in turn, up to ``depth`` batches ahead in a background thread."""

        def read(start: int, stop: int, stopped: threading.Event) -> Batch | None:
            samples = [self._wait_for(self._order.training, index, stopped) for index in range(start, stop)]
            return None if stopped.is_set() else self._batch(samples)

        return ReadAhead(read, ranges, depth)

    def _wait_for(
        self, find: Callable[[int], Sample], index: int, stopped: threading.Event | None = None
    ) -> Sample | None:
        """The sample of ``index`` as soon as it is known; None if ``stopped`` is set before."""
        started, told = time.monotonic(), -MESSAGE_INTERVAL
        while stopped is None or not stopped.is_set():
            try:
                with self._lock:
                    return find(index)
            except NotReady as missing:
                self._raise_failure()
                waited = time.monotonic() - started
                if waited - told >= MESSAGE_INTERVAL:
                    told = waited
                    self._on_wait(f"Waiting for data: {missing} ({waited:.0f} s so far).")
                time.sleep(self._poll)
        return None

    def _raise_failure(self) -> None:
        try:
            message = self._storage.read_bytes(f"plans/{self.plan.fingerprint}.failed").decode()
        except FileNotFoundError:
            return
        raise UserError(message)

    def _batch(self, samples: list[Sample]) -> Batch:
        width = self.plan.recipe.sequence_length
        tokens = np.empty((len(samples), width), np.int64)
        lengths = np.empty(len(samples), np.int64)
        starts = []
        with self._lock:
            for at, sample in enumerate(samples):
                shard = self._shard(sample.source, sample.file, sample.part)
                tokens[at], starts_of_row, lengths[at] = shard.row(sample.row)
                starts.append(starts_of_row)
        return Batch(tokens, *model_inputs(tokens, starts, lengths), samples)

    def _shard(self, *address) -> OpenShard:
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
        name = shard_name(self.plan.keys[source][file], part)
        for mend in (lambda: self._storage.forget(name), lambda: self._remake(source, file, part, record.sha256)):
            try:
                return open_shard(self._storage.local(name), record)
            except (Damaged, FileNotFoundError):
                mend()
        return open_shard(self._storage.local(name), record)

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
    def _tokenizer(self):
        return self.plan.open_tokenizer(self._storage)
