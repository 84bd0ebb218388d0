"""Prepare a plan's shards with Ray Data: some tasks read, others make a shard of each part and return its record.

A task that reads goes on through a file and hands over one part after the other: the time is linear in the file's size,
and one large file keeps as many tasks busy as many small ones. Shards are made in the order in which training needs
them, and only as many as it needs. Committed ones are skipped, so a stopped preparation resumes where it was. It runs
beside training, in a thread of the driver.
"""

import logging
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import ceil, inf
from typing import Any

from data_pipelines.order.catalog import Catalog
from data_pipelines.order.order import NotReady, Order, SourceOrder
from data_pipelines.order.plan import Plan
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.common.words import count, listed

SHARDS_PER_ROUND = 16  # at least; times the shards that are made at the same time
MUCH_PADDING, ENOUGH_ROWS = 0.05, 200  # part of the tokens, and sequences that tell it
SAVE_INTERVAL = 30.0  # seconds between two snapshots of the catalog

Address = tuple[str, int, int]  # (source, file, part)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    Args:
        fraction: prepared part of what is needed, in 0..1, with what earlier runs prepared.
        documents: documents that this run prepared.
        tokens: tokens that this run prepared.
        seconds: time since this run started.
        eta_seconds: estimated time until everything needed is prepared; None while unknown.
    """

    fraction: float
    documents: int
    tokens: int
    seconds: float
    eta_seconds: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens that this run prepared per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        eta = "" if self.eta_seconds is None else f", {self.eta_seconds:,.0f} s to go"
        return (
            f"{self.fraction:6.1%} prepared: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.tokens_per_second:,.0f} tokens/s{eta}"
        )


def prepare(
    plan: Plan,
    storage: Storage,
    training_sequences: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Commit the shards that the held-out set and the first ``training_sequences`` training sequences need.

    Args:
        plan: plan that is committed in ``storage``.
        storage: storage that the shards are written to, as tasks on any node open it.
        training_sequences: ``max_steps * global_batch_size``; None prepares every file.
        on_progress: called after every shard.
        should_stop: called after every shard; True ends the preparation early.

    Raises:
        UserError: a file cannot be read (the message names it), or the disk is full. Waiting readers raise it too.
    """
    failure = f"plans/{plan.fingerprint}.failed"
    storage.delete(failure)
    try:
        return _Preparation(plan, storage, training_sequences).run(on_progress, should_stop)
    except UserError as error:
        storage.write_bytes(failure, str(error).encode())
        raise


def missing_shards(plan: Plan, order: Order, catalog: Catalog, needed: dict[str, float], limit: int) -> list[Address]:
    """Choose up to ``limit`` shards to make next, in the order in which training needs them; none when all exist.

    The sequences of a shard and the parts of a file are estimated from the records so far; before the first record of a
    source only its first group is wanted. Some may lie beyond the end of their file.

    Args:
        plan: the plan whose shards are made.
        order: the order of the plan's sequences.
        catalog: the plan's commit records.
        needed: number of sequences needed of each source.
        limit: the most shards to choose.
    """
    wanted: list[tuple[float, Address]] = []
    for name, source in order.sources.items():
        _extend(source, needed[name])
        if source.has(needed[name]):
            continue
        records = catalog.records(name)
        rows_per_shard = sum(record.rows for record in records.values()) / len(records) if records else inf
        kept_per_shard = sum(record.held_out_rows for record in records.values()) / len(records) if records else inf
        parts = [part + 1 for (_, part), record in records.items() if record.last]
        parts_per_file = ceil(sum(parts) / len(parts)) if parts else inf
        position, kept, found = float(source.training_rows), float(source.held_out_rows), 0
        for group in _groups_ahead(source, parts_per_file, catalog):
            if (position >= needed[name] and kept >= source.held_out) or found >= limit:
                break
            missing = [address for address in group if catalog(*address) is None]
            wanted += [(position / plan.units[name], address) for address in missing]
            position += rows_per_shard * len(group)
            kept += kept_per_shard * len(group)
            found += len(missing)
    return [address for _, address in sorted(wanted, key=lambda entry: entry[0])[:limit]]


def _extend(source: SourceOrder, needed: float) -> None:
    try:
        while not source.has(needed):
            source.extend()
    except NotReady:
        return


def _groups_ahead(source: SourceOrder, parts_per_file: float, catalog: Catalog) -> Iterator[list[Address]]:
    """The shards of the next unknown group and of the groups that probably follow it."""
    first = source.next_group
    stripes = [([file for file, _ in first], first[0][1])]
    stripes += [(list(files), 0) for files in source.following_stripes()]
    for at, (files, part) in enumerate(stripes):
        least = part if at == 0 else 0
        while files and (part < parts_per_file or part == least):
            group = [(source.name, file, part) for file in files]
            yield group
            records = {address[1]: catalog(*address) for address in group}
            files = [file for file, record in records.items() if record is None or not record.last]
            part += 1


@dataclass(frozen=True)
class PartRange:
    """Consecutive missing parts of a file, which one task reads: ``count`` from part ``first`` on."""

    source: str
    file: int
    first: int
    count: int


def part_ranges(addresses: list[Address]) -> list[PartRange]:
    """Join the addresses of consecutive parts of a file, in the order of the first address of each range."""
    ranges: list[PartRange] = []
    newest: dict[tuple[str, int], int] = {}  # of each file, the place of its last range
    for source, file, part in addresses:
        at = newest.get((source, file))
        if at is not None and ranges[at].first + ranges[at].count == part:
            ranges[at] = replace(ranges[at], count=ranges[at].count + 1)
        else:
            newest[source, file] = len(ranges)
            ranges.append(PartRange(source, file, part, 1))
    return ranges


class _Preparation:
    def __init__(self, plan: Plan, storage: Storage, training_sequences: int | None):
        self.plan, self.storage = plan, storage
        self.catalog = Catalog(plan, storage, check_sizes=True)
        self.order = plan.order(self.catalog)
        self.needed: dict[str, float] = {
            name: inf if training_sequences is None else self.order.rows_needed(name, training_sequences)
            for name in plan.units
        }
        self.started = time.monotonic()
        self.documents = self.tokens = 0
        self.fraction_before: float | None = None  # what earlier runs prepared, once known

    def run(self, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]) -> Progress:
        saved, stopped = time.monotonic(), False
        tasks = self.plan.recipe.max_tasks or _cluster_cpus()
        while not stopped:
            # a compressed file is unpacked from its beginning once a round, so rounds grow with what has been made
            limit = max(SHARDS_PER_ROUND * tasks, sum(len(self.catalog.records(name)) for name in self.plan.units))
            addresses = missing_shards(self.plan, self.order, self.catalog, self.needed, limit)
            if self.fraction_before is None:
                self.fraction_before = self._fraction()
            if not addresses:
                break
            for result in self._make(addresses, tasks):
                self._take(result)
                on_progress(self._progress())
                if time.monotonic() - saved > SAVE_INTERVAL:
                    self.catalog.save()
                    saved = time.monotonic()
                if stopped := should_stop():
                    break
        self.catalog.save()
        self._say_what_is_left_out()
        self._say_what_is_padding()
        self._say_what_is_not_held_out()
        progress = self._progress()
        on_progress(progress)
        return progress

    def _make(self, addresses: list[Address], tasks: int) -> Iterator[dict[str, Any]]:
        import ray
        from ray.data import DataContext, TaskPoolStrategy

        plan, storage, cpus = self.plan, self.storage, self.plan.recipe.num_cpus_per_task

        def read(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
            return _read_parts(storage, plan, PartRange(**item))

        def make(item: dict[str, Any]) -> dict[str, Any]:
            return _make_shard(storage, plan, **item)

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # each part, and each record, is handed on as soon as it is there
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # where a file ends sooner
        items = [asdict(parts) for parts in part_ranges(addresses)]
        dataset = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .flat_map(read, num_cpus=cpus, compute=TaskPoolStrategy(size=min(tasks, len(items))))
            .map(make, num_cpus=cpus, compute=TaskPoolStrategy(size=min(tasks, len(addresses))))
        )
        return iter(dataset.iter_rows())

    def _take(self, result: dict[str, Any]) -> None:
        if result["error"]:
            raise UserError(result["error"])
        self.documents += result["documents"]
        self.tokens += result["tokens"]
        self.catalog(result["source"], result["file"], result["part"])

    def _say_what_is_left_out(self) -> None:
        records = [record for name in self.plan.units for record in self.catalog.records(name).values()]
        rows = [record for record in records if record.skipped_rows]
        files = [record for record in records if record.skipped and not record.skipped_rows]
        phrases = []
        if files:
            phrases.append(f"the unreadable rest of {count(len(files), 'file')} ({files[0].skipped})")
        if rows:
            phrases.append(f"{count(sum(record.skipped_rows for record in rows), 'row')} ({rows[0].skipped})")
        if phrases:
            _log.warning("data.skip_unreadable leaves out %s.", listed(phrases))

    def _say_what_is_not_held_out(self) -> None:
        self.order.check_held_out()
        short = [source for source in self.order.sources.values() if source.finished and not source.has_held_out]
        if short:
            each = [f"{source.name} {source.held_out_rows} of {source.held_out}" for source in short]
            _log.warning(
                "The held-out set is smaller than data.held_out_sequences (%s): raise data.held_out_fraction for more.",
                listed(each),
            )

    def _say_what_is_padding(self) -> None:
        for name in self.plan.units:
            records = self.catalog.records(name).values()
            room = sum(record.rows + record.held_out_rows for record in records) * self.plan.recipe.sequence_length
            padding = 1 - sum(record.tokens for record in records) / room if room else 0.0
            if padding > MUCH_PADDING and room > ENOUGH_ROWS * self.plan.recipe.sequence_length:
                _log.warning(
                    "%.0f %% of the sequences of the source %s is padding, for its documents do not fit together: set "
                    "--data.packing stream, or another --data.sequence-length.",
                    *(100 * padding, name),
                )

    def _fraction(self) -> float:
        total = 0.0
        for name, source in self.order.sources.items():
            if source.finished:
                fraction = 1.0
            elif self.needed[name] == inf:
                ended = sum(record.last for record in self.catalog.records(name).values())
                fraction = ended / len(self.plan.files[name])
            else:
                records = self.catalog.records(name).values()
                fraction = min(
                    1.0,
                    sum(record.rows for record in records) / max(1.0, self.needed[name]),
                    sum(record.held_out_rows for record in records) / source.held_out if source.held_out else 1.0,
                )
            total += fraction * self.plan.units[name]
        return total / sum(self.plan.units.values())

    def _progress(self) -> Progress:
        seconds, fraction = time.monotonic() - self.started, self._fraction()
        gained = fraction - (self.fraction_before or 0.0)
        eta = (1 - fraction) / gained * seconds if gained > 0 else None
        return Progress(fraction, self.documents, self.tokens, seconds, eta)


def _cluster_cpus() -> int:
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


_tokenizers: dict[tuple[str, str], Any] = {}  # opened once per process


def _read_parts(storage: Storage, plan: Plan, parts: PartRange) -> Iterator[dict[str, Any]]:
    """Read parts in a task. A UserError is handed over, since Ray would wrap it in its own error."""
    item = {"source": parts.source, "file": parts.file, "part": parts.first, "content": b"", "error": ""}
    try:
        for part in islice(plan.read_parts(storage, parts.source, parts.file, parts.first), parts.count):
            yield {**item, "part": part.number, "content": pickle.dumps(part)}
    except UserError as error:
        yield {**item, "error": str(error)}


def _make_shard(
    storage: Storage, plan: Plan, source: str, file: int, part: int, content: bytes, error: str
) -> dict[str, Any]:
    """Make the shard of a part in a task, and return what is in it or the error."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one core's work
    result = {"source": source, "file": file, "part": part, "tokens": 0, "documents": 0, "error": error}
    if error:
        return result
    try:
        name = (storage.root, plan.tokenizer)
        if name not in _tokenizers:
            _tokenizers[name] = plan.open_tokenizer(storage)
        record = plan.commit_part(storage, source, file, pickle.loads(content), _tokenizers[name])
    except UserError as raised:
        return {**result, "error": str(raised)}
    return {**result, "tokens": record.tokens, "documents": record.documents}
