import errno
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.workloads.training_workload import TrainingWorkload
from data_pipelines.order import patience as patience_module
from data_pipelines.order.packed_sequences import PackedSequences
from data_pipelines.order.patience import Patience
from data_pipelines.order.plan import make_plan
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from doge.common.errors import UserError
from doge.common.storage import CacheError, Storage, StorageError
from doge.tokenizer.training import TokenizerRecipe


class Flaky(MemoryFileSystem):
    """Answers the given number of times, then fails the given number of times, then answers again."""

    cachable, answers, failures = False, 0, 0

    def _may_fail(self):
        self.answers -= 1
        if self.answers < 0 and self.failures > 0:
            self.failures -= 1
            raise OSError(errno.ETIMEDOUT, "timed out")

    def cat_file(self, path, **options):
        self._may_fail()
        return super().cat_file(path, **options)

    def get_file(self, rpath, lpath, **options):
        self._may_fail()
        super().get_file(rpath, lpath, **options)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience_module, "LAST_PAUSE_SECONDS", 0.02)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan of one source, with its shards in a memory file system; not one has been read yet."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"text": f"Line {number} counts {number * 7} and on and on."} for number in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage = Storage(str(folder / "storage"))
    recipe = DataRecipe({"a": SourceRecipe(str(folder / "a.jsonl"), 1)}, sequence_length=32, held_out_sequences=0)
    plan = make_plan(replace(recipe, documents_per_shard=10), TokenizerRecipe(None, 300, 4_000), storage)
    tokenizer = plan.open_tokenizer(storage)
    for part in range(4):
        plan.make_shard(storage, "a", 0, part, tokenizer)
    fsspec.filesystem("memory").put(storage.root, "/away", recursive=True)
    yield plan
    fsspec.filesystem("memory").rm("/away", recursive=True)


@pytest.fixture
def reader(plan, tmp_path):
    store, waits, said = Flaky(), [], []
    storage = Storage("memory://away", cache=str(tmp_path), filesystem=store)
    feed = PackedSequences(storage, plan.fingerprint, on_wait=waits.append, on_trouble=said.append)
    return SimpleNamespace(store=store, waits=waits, said=said, feed=feed)


@pytest.mark.parametrize("answers", range(4))  # every call that reading takes
def test_it_reads_the_same_once_the_storage_is_back(answers, reader, plan, tmp_path):
    reader.store.answers, reader.store.failures = answers, 3
    tokens = reader.feed.read(0, 8).tokens
    calm = Storage("memory://away", cache=str(tmp_path / "another"))
    assert (tokens == PackedSequences(calm, plan.fingerprint).read(0, 8).tokens).all()
    assert reader.store.failures == 0
    assert reader.waits == [""] * 3  # signs of life, for whoever watches this host
    first, last = reader.said
    assert "cannot read its data (The storage memory://away cannot be reached (" in first
    assert first.endswith("it waits and tries again for 10 minutes.")
    assert last.endswith("can read its data again, after 0 s.")


def test_it_gives_up_with_the_storages_own_sentence(reader, monkeypatch):
    monkeypatch.setattr(patience_module, "GIVE_UP_SECONDS", 0.2)
    reader.store.failures = 10**9
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"^The storage memory://away cannot be reached"):
        reader.feed.read(0, 1)
    assert 0.1 < time.monotonic() - started < 5
    assert len(reader.said) == 1


def test_the_pauses_grow(monkeypatch):
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(patience_module, "LAST_PAUSE_SECONDS", 30.0)
    pauses = []

    def act():
        if len(pauses) < 8:
            raise StorageError("away.")

    Patience(lambda: None).read(act, SimpleNamespace(wait=pauses.append))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_reader_that_is_stopped_waits_no_longer(reader, monkeypatch):
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_SECONDS", 100.0)
    reader.store.failures = 10**9
    ahead = reader.feed.prefetch([(0, 8)])
    while not reader.said:
        time.sleep(0.01)
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 5


def test_a_run_that_is_stopped_ends_the_wait(plan, tmp_path):
    def stopped(message):
        raise UserError("stopped")

    store = Flaky()
    storage = Storage("memory://away", cache=str(tmp_path), filesystem=store)
    feed = PackedSequences(storage, plan.fingerprint, on_wait=stopped)
    store.failures = 10**9
    with pytest.raises(UserError, match=r"^stopped$"):
        feed.read(0, 1)


def test_trouble_of_this_machines_cache_is_not_waited_for(reader):
    """Another machine may do the work at once."""

    def fail():
        raise CacheError("The disk that holds /tmp/cache is full.")

    with pytest.raises(CacheError):
        Patience(pytest.fail).read(fail, threading.Event())

    def full(rpath, lpath, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    reader.store.get_file = full
    with pytest.raises(CacheError, match="is full: free some space"):
        reader.feed.read(0, 1)
    assert reader.said == []


def test_a_storage_that_forbids_a_file_is_not_taken_for_the_cache(reader, monkeypatch):
    monkeypatch.setattr(patience_module, "GIVE_UP_SECONDS", 0.0)

    def forbid(rpath, lpath, **options):
        raise PermissionError("Forbidden")

    reader.store.get_file = forbid
    with pytest.raises(StorageError, match=r"The storage memory://away cannot be used \(Forbidden\)"):
        reader.feed.read(0, 1)


def test_a_wait_is_progress_and_says_nothing_twice(monkeypatch):
    workload = TrainingWorkload.__new__(TrainingWorkload)
    said = []
    answer = SimpleNamespace(remote=lambda: None)
    workload.job = SimpleNamespace(board=SimpleNamespace(stopped=answer))
    workload._moves, workload._loop, workload.say = 0, SimpleNamespace(rank=0), said.append
    monkeypatch.setattr("cluster.workloads.training_workload.ray.get", lambda reference: None)
    for message in ("Waiting for data.", "", ""):
        workload._wait_message(message)
    assert (workload._moves, said) == (3, ["Waiting for data."])
