"""Prepare a plan's shards with Ray Data: one task reads, tokenizes, packs and writes a shard and returns its record.

Shards are made in the order in which training needs them, and only as many as it needs. Committed ones are skipped, so
a stopped preparation resumes where it was. It runs beside training, in a thread of the driver.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil, inf
from typing import Any

from data_pipelines.order.catalog import Catalog
from data_pipelines.order.order import NotReady, Order, SourceOrder
from data_pipelines.order.plan import Plan
from doge.common.errors import UserError
from doge.common.storage import Storage

SHARDS_PER_ROUND = 16  # times the shards that are made at the same time
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


def missing_shards(
    plan: Plan, order: Order, catalog: Catalog, needed: dict[str, float], limit: int, beyond: set[Address]
) -> list[Address]:
    """Choose up to ``limit`` shards to make next, in the order in which training needs them; none when all exist.

    The sequences of a shard and the parts of a file are estimated from the records so far; before the first record of a
    source only its first group is wanted.

    Args:
        plan: the plan whose shards are made.
        order: the order of the plan's sequences.
        catalog: the plan's commit records.
        needed: number of sequences needed of each source.
        limit: the most shards to choose.
        beyond: addresses past the end of their file.
    """
    wanted: list[tuple[float, Address]] = []
    for name, source in order.sources.items():
        _extend(source, needed[name])
        if source.finished or source.rows >= needed[name]:
            continue
        records = catalog.records(name)
        rows_per_shard = sum(record.rows for record in records.values()) / len(records) if records else inf
        parts = [part + 1 for (_, part), record in records.items() if record.last]
        parts_per_file = ceil(sum(parts) / len(parts)) if parts else inf
        position, found = float(source.rows), 0
        for group in _groups_ahead(source, parts_per_file, catalog, beyond):
            if position >= needed[name] or found >= limit:
                break
            missing = [address for address in group if catalog(*address) is None]
            wanted += [(position / plan.units[name], address) for address in missing]
            position += rows_per_shard * len(group)
            found += len(missing)
    return [address for _, address in sorted(wanted, key=lambda entry: entry[0])[:limit]]


def _extend(source: SourceOrder, needed: float) -> None:
    try:
        while not source.finished and source.rows < needed:
            source.extend()
    except NotReady:
        return


def _groups_ahead(
    source: SourceOrder, parts_per_file: float, catalog: Catalog, beyond: set[Address]
) -> Iterator[list[Address]]:
    """The shards of the next unknown group and of the groups that probably follow it."""
    first = source.next_group
    stripes = [([file for file, _ in first], first[0][1])]
    stripes += [(list(files), 0) for files in source.following_stripes()]
    for at, (files, part) in enumerate(stripes):
        least = part if at == 0 else 0
        while files and (part < parts_per_file or part == least):
            group = [(source.name, file, part) for file in files if (source.name, file, part) not in beyond]
            yield group
            records = {address[1]: catalog(*address) for address in group}
            files = [file for file, record in records.items() if record is None or not record.last]
            part += 1


class _Preparation:
    def __init__(self, plan: Plan, storage: Storage, training_sequences: int | None):
        self.plan, self.storage = plan, storage
        self.catalog = Catalog(plan, storage, check_sizes=True)
        self.order = plan.order(self.catalog)
        self.needed: dict[str, float] = {
            name: inf if training_sequences is None else self.order.rows_needed(name, training_sequences)
            for name in plan.units
        }
        self.beyond: set[Address] = set()
        self.started = time.monotonic()
        self.documents = self.tokens = 0
        self.fraction_before: float | None = None  # what earlier runs prepared, once known

    def run(self, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]) -> Progress:
        saved, stopped = time.monotonic(), False
        tasks = self.plan.recipe.max_tasks or _cluster_cpus()
        while not stopped:
            addresses = missing_shards(
                self.plan, self.order, self.catalog, self.needed, SHARDS_PER_ROUND * tasks, self.beyond
            )
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
        progress = self._progress()
        on_progress(progress)
        return progress

    def _make(self, addresses: list[Address], tasks: int) -> Iterator[dict[str, Any]]:
        import ray
        from ray.data import DataContext, TaskPoolStrategy

        plan, storage = self.plan, self.storage

        def make(item: dict[str, Any]) -> dict[str, Any]:
            return _make_shard(storage, plan, **item)

        context = DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"source": source, "file": file, "part": part} for source, file, part in addresses]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            make,
            num_cpus=plan.recipe.num_cpus_per_task,
            compute=TaskPoolStrategy(size=min(tasks, len(items))),
        )
        return iter(dataset.iter_rows())

    def _take(self, result: dict[str, Any]) -> None:
        if result["error"]:
            raise UserError(result["error"])
        address = (result["source"], result["file"], result["part"])
        if not result["made"]:
            self.beyond.add(address)
            return
        self.documents += result["documents"]
        self.tokens += result["tokens"]
        if result["skipped"]:
            _log.warning("A file is left out: %s", result["skipped"])
        self.catalog(*address)

    def _fraction(self) -> float:
        total = 0.0
        for name, source in self.order.sources.items():
            if source.finished:
                fraction = 1.0
            elif self.needed[name] == inf:
                ended = sum(record.last for record in self.catalog.records(name).values())
                fraction = ended / len(self.plan.files[name])
            else:
                rows = sum(record.rows for record in self.catalog.records(name).values())
                fraction = min(1.0, rows / max(1.0, self.needed[name]))
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


def _make_shard(storage: Storage, plan: Plan, source: str, file: int, part: int) -> dict[str, Any]:
    """Run one task. A UserError is returned, since Ray would wrap it in its own error."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one core's work
    address = {"source": source, "file": file, "part": part}
    empty = {"made": False, "error": "", "rows": 0, "tokens": 0, "documents": 0, "skipped": ""}
    try:
        name = (storage.root, plan.tokenizer)
        if name not in _tokenizers:
            _tokenizers[name] = plan.open_tokenizer(storage)
        record = plan.make_shard(storage, source, file, part, _tokenizers[name])
    except UserError as error:
        return {**address, **empty, "error": str(error)}
    if record is None:
        return {**address, **empty}
    made = {key: value for key, value in asdict(record).items() if key in empty and key != "skipped"}
    return {**address, **empty, **made, "made": True, "skipped": record.skipped or ""}
