"""However a preparation was stopped, killed, damaged or overtaken by its reader, sequence i stays what it is."""

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from whole_plans import make_everything

from cluster.machines.head_storage import share
from data_pipelines.order.catalog import Catalog
from data_pipelines.order.packed_sequences import PackedSequences, PackedSequencesConfig
from data_pipelines.order.plan import make_plan
from data_pipelines.sources.rows import Unreadable
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.shards import Damaged, open_shard, read_record, record_name, shard_name
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe

TOKENIZER = TokenizerRecipe(vocab_size=400, training_bytes=40_000)
SEQUENCES = 90  # past the end of the smallest source


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources: five files of 3 to 43 documents, and two of conversations."""
    root = tmp_path_factory.mktemp("corpus")
    for number, count in enumerate((43, 3, 20, 17, 21)):
        rows = [{"text": f"File {number} counts {line}: " + "and on " * (line * 7 % 31)} for line in range(count)]
        (root / f"prose-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):
        rows = [{"prompt": f"What is {line}?", "text": f"It is {line} of {number}. " * 6} for line in range(15)]
        (root / f"chat-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def recipe(corpus):
    sources = {
        "prose": SourceRecipe(str(corpus / "prose-*.jsonl"), 3),
        "chat": SourceRecipe(str(corpus / "chat-*.jsonl"), 1, "conversation"),
    }
    return DataRecipe(
        sources,
        sequence_length=64,
        held_out_sequences=8,
        held_out_fraction=0.25,
        documents_per_shard=10,
        files_per_stripe=2,
        max_tasks=2,
    )


@pytest.fixture(scope="module")
def complete(recipe, tmp_path_factory):
    """(storage, plan, batch) of a preparation that nothing disturbed, made without Ray."""
    storage = Storage(str(tmp_path_factory.mktemp("complete")))
    plan = make_plan(recipe, TOKENIZER, storage)
    make_everything(plan, storage)
    return storage, plan, PackedSequences(storage, plan.fingerprint).read(0, SEQUENCES)


def fresh_copy(complete, tmp_path):
    """The complete storage again, to be damaged."""
    shutil.copytree(complete[0].root, tmp_path / "copy")
    return Storage(str(tmp_path / "copy"))


def same(batch, other):
    assert batch.samples == other.samples
    for name in ("tokens", "position_ids", "labels"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def test_held_out_and_training_rows_are_documents_of_their_source(complete):
    storage, plan, batch = complete
    tokenizer = plan.open_tokenizer(storage)
    feed = PackedSequences(storage, plan.fingerprint, held_out=True)
    held_out = feed.read(0, feed.length)
    assert len(held_out) == 8
    assert not set(held_out.samples) & set(batch.samples)
    for found in (batch, held_out):
        for tokens, sample in zip(found.tokens, found.samples, strict=True):
            text = tokenizer.decode(tokens)
            path = plan.files[sample.source][sample.file].path
            number = Path(path).stem.removeprefix(f"{sample.source}-")
            other = "What is" if sample.source == "prose" else "counts"
            assert other not in text
            assert set(re.findall(r"File (\d) counts", text)) <= {number}


@pytest.mark.slow
def test_a_stopped_preparation_goes_on_to_the_same_order(complete, recipe, tmp_path, ray_cluster):
    from data_pipelines.prepare import prepare

    storage = share(Storage(str(tmp_path)))
    plan = make_plan(recipe, TOKENIZER, storage)
    assert plan.fingerprint == complete[1].fingerprint
    made = []
    prepare(plan, storage, None, should_stop=lambda: made.append(0) or len(made) >= 3)
    count = len(committed(storage))
    assert 0 < count < len(committed(complete[0]))

    partly = prepare(plan, storage, 16)
    same(PackedSequences(storage, plan.fingerprint).read(0, 16), complete[2][:16])
    assert partly.fraction == 1
    assert count < len(committed(storage)) < len(committed(complete[0]))

    seen = []
    prepare(plan, storage, None, on_progress=seen.append)
    assert committed(storage) == committed(complete[0])
    same(PackedSequences(storage, plan.fingerprint).read(0, SEQUENCES), complete[2])
    assert [progress.fraction for progress in seen] == sorted(progress.fraction for progress in seen)
    assert seen[-1].fraction == 1
    assert seen[-1].tokens > 0

    assert prepare(plan, storage, None).documents == 0  # nothing is made twice


def committed(storage):
    """Bytes of every committed shard by name."""
    root = Path(storage.root)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("shards/*/*.arrow")}


@pytest.mark.slow
def test_a_killed_preparation_leaves_only_whole_shards(complete, recipe, tmp_path):
    storage = Storage(str(tmp_path))
    plan = make_plan(recipe, TOKENIZER, storage)
    script = (
        "import sys; from data_pipelines.order.plan import load_plan; from doge.common.storage import Storage\n"
        "storage = Storage(sys.argv[1]); plan = load_plan(storage, sys.argv[2])\n"
        "tokenizer = plan.open_tokenizer(storage)\n"
        "while True:\n"
        "    for file in range(5): plan.make_shard(storage, 'prose', file, 0, tokenizer)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, storage.root, plan.fingerprint]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)})
    deadline = time.monotonic() + 60
    while not committed(storage) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = committed(storage)
    assert found
    assert all(complete_bytes == committed(complete[0])[name] for name, complete_bytes in found.items())
    make_everything(plan, storage)
    same(PackedSequences(storage, plan.fingerprint).read(0, SEQUENCES), complete[2])


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_a_damaged_shard_is_noticed_and_made_again_by_its_reader(complete, tmp_path, how):
    storage = fresh_copy(complete, tmp_path)
    _, plan, batch = complete
    for path in Path(storage.root).glob("shards/*/*.arrow"):
        damage(path, how)
    address = plan.keys["prose"][0], 0
    if how != "deleted":
        with pytest.raises(Damaged):
            open_shard(storage.path(shard_name(*address)), read_record(storage, *address))
    same(PackedSequences(storage, plan.fingerprint).read(0, SEQUENCES), batch)
    expected = committed(complete[0])
    assert all(content == expected[name] for name, content in committed(storage).items() if used(name, plan, batch))


def used(name, plan, batch):
    return name in {shard_name(plan.keys[sample.source][sample.file], sample.part) for sample in batch.samples}


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_a_damaged_shard_is_not_ready_for_a_preparation(complete, tmp_path, how):
    storage = fresh_copy(complete, tmp_path)
    _, plan, _ = complete
    damage(Path(storage.path(shard_name(plan.keys["prose"][0], 0))), how)
    assert Catalog(plan, storage, check_sizes=True)("prose", 0, 0) is None
    assert Catalog(plan, storage, check_sizes=True)("prose", 1, 0) is not None


def test_a_shard_that_cannot_be_made_again_as_it_was_is_refused(complete, tmp_path):
    storage = fresh_copy(complete, tmp_path)
    _, plan, batch = complete
    sample = batch.samples[0]
    address = plan.keys[sample.source][sample.file], sample.part
    record = json.loads(storage.read_bytes(record_name(*address)))
    storage.write_bytes(record_name(*address), json.dumps(record | {"sha256": "0" * 64}).encode())
    with pytest.raises(UserError, match="cannot be made again as it was"):
        PackedSequences(storage, plan.fingerprint).read(0, 1)


def test_a_reader_waits_with_a_message_and_then_reads_the_same(complete, tmp_path):
    _, plan, batch = complete
    storage = fresh_copy(complete, tmp_path)
    shutil.move(Path(storage.root) / "shards", tmp_path / "away")
    messages = []
    reader = PackedSequences(storage, plan.fingerprint, on_wait=messages.append, poll_seconds=0.02)
    threading.Timer(0.3, shutil.move, (tmp_path / "away", Path(storage.root) / "shards")).start()
    same(reader.read(0, SEQUENCES), batch)
    assert len(messages) == 1
    assert "Waiting for data" in messages[0]


@pytest.mark.slow
def test_waiting_readers_learn_that_the_preparation_failed(complete, tmp_path, ray_cluster):
    from data_pipelines.prepare import prepare

    root = tmp_path / "inputs"
    root.mkdir()
    (root / "good.jsonl").write_text('{"text": "good"}\n' * 30)
    (root / "bad.jsonl").write_text('{"text": "good"}\n' * 25 + '{"text": \n')
    storage = share(Storage(str(tmp_path / "store")))
    recipe = DataRecipe(
        {"a": SourceRecipe(str(root), 1)}, sequence_length=16, held_out_sequences=0, documents_per_shard=10
    )
    tokenizer = TokenizerRecipe(complete[0].path(complete[1].tokenizer))
    plan = make_plan(recipe, tokenizer, storage)
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        prepare(plan, storage)
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        PackedSequences(storage, plan.fingerprint, poll_seconds=0.02).read(0, 10**4)

    skipping = make_plan(replace(recipe, skip_unreadable=True), tokenizer, storage)
    prepare(skipping, storage)
    assert len(PackedSequences(storage, skipping.fingerprint).read(0, 12).samples) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.jsonl.gz", "one.json", "one.parquet"])
def test_one_file_is_prepared_by_many_tasks_and_what_is_left_out_is_said_once(
    complete, tmp_path, ray_cluster, caplog, name
):
    from data_pipelines.prepare import prepare

    rows = [{"text": f"Row {number} counts on. " * (number % 9 + 1)} for number in range(200)]
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"text": [row["text"] for row in rows]}), tmp_path / name)
    else:
        rows[30] = rows[150] = {"text": 7}
        lines = "\n".join(map(json.dumps, rows)).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else json.dumps(rows).encode())
    recipe = DataRecipe(
        {"a": SourceRecipe(str(tmp_path / name), 1)}, sequence_length=32, held_out_sequences=0, documents_per_shard=7,
        skip_unreadable=True, max_tasks=2,
    )  # fmt: skip
    given = TokenizerRecipe(complete[0].path(complete[1].tokenizer))
    alone, together = Storage(str(tmp_path / "alone")), share(Storage(str(tmp_path / "together")))
    plan = make_plan(recipe, given, alone)
    make_everything(plan, alone)
    progress = prepare(make_plan(recipe, given, together), together)
    assert committed(together) == committed(alone)
    assert progress.fraction == 1
    said = [record.getMessage() for record in caplog.records if "skip_unreadable" in record.getMessage()]
    assert [sentence.split(" (")[0] for sentence in said] == (
        [] if name.endswith(".parquet") else ["data.skip_unreadable leaves out 2 rows"]
    )


def test_an_empty_file_is_named_and_skipped_only_on_request(complete, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    storage = Storage(str(tmp_path / "store"))
    recipe = DataRecipe({"a": SourceRecipe(str(tmp_path / "empty.jsonl"), 1)})
    given = TokenizerRecipe(complete[0].path(complete[1].tokenizer))
    plan = make_plan(recipe, given, storage)
    tokenizer = plan.open_tokenizer(storage)
    with pytest.raises(Unreadable, match=r"empty\.jsonl is empty"):
        plan.make_shard(storage, "a", 0, 0, tokenizer)
    skipping = replace(plan, recipe=replace(recipe, skip_unreadable=True))
    record = skipping.make_shard(storage, "a", 0, 0, tokenizer)
    assert (record.rows, record.last, "empty.jsonl" in record.skipped) == (0, True, True)
    assert Catalog(plan, storage)("a", 0, 0) is None  # who does not skip does not take a skipped file for prepared


def test_prefetching_gives_the_same_batches_and_ends_its_thread(complete):
    storage, plan, batch = complete
    reader = PackedSequences(storage, plan.fingerprint)
    ranges = [(start, start + 7) for start in range(0, 70, 7)]
    for (start, stop), found in zip(ranges, reader.prefetch(ranges), strict=True):
        same(found, reader.read(start, stop))
    same(reader.read(0, SEQUENCES), batch)
    abandoned = reader.prefetch((i, i + 1) for i in range(10**9))
    next(abandoned)
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_feed_opens_anywhere_from_its_config_and_gives_parts_of_what_it_read(complete):
    storage, plan, batch = complete
    training, held_out = (
        pickle.loads(pickle.dumps(PackedSequencesConfig(plan.fingerprint, part))).open(storage, print, print)
        for part in (False, True)
    )
    assert (training.fingerprint, training.length) == (plan.fingerprint, None)
    assert (held_out.fingerprint != plan.fingerprint, held_out.length) == (True, 8)
    assert len(batch[3:7]) == 4
    same(training.read(3, 7), batch[3:7])
    assert training.cost(0) == training.cost(10**9) == held_out.cost(7) == 1.0
    with pytest.raises(IndexError):
        held_out.read(0, 9)


def test_who_waits_for_data_can_be_woken(complete, tmp_path):
    storage = fresh_copy(complete, tmp_path)
    shutil.rmtree(storage.path("shards"))
    batches = PackedSequences(storage, complete[1].fingerprint, poll_seconds=0.02).prefetch([(0, 1)])
    waker = threading.Timer(0.1, batches.stop)
    waker.start()
    with pytest.raises(RuntimeError, match="stopped"):
        next(batches)
    batches.close()
    waker.join()


def test_an_error_while_prefetching_reaches_the_caller(complete):
    def broken():
        yield 0, 1
        raise RuntimeError("no more ranges")

    batches = PackedSequences(complete[0], complete[1].fingerprint).prefetch(broken())
    next(batches)
    with pytest.raises(RuntimeError, match="no more ranges"):
        next(batches)


def test_another_seed_or_place_makes_no_shard_anew(complete, recipe, corpus, tmp_path):
    storage, plan, _ = complete
    moved = shutil.copytree(corpus, tmp_path / "moved")
    sources = {
        name: replace(source, path=source.path.replace(str(corpus), str(moved)))
        for name, source in recipe.sources.items()
    }
    other = make_plan(replace(recipe, sources=sources, seed=1), TOKENIZER, storage)
    assert other.fingerprint != plan.fingerprint
    assert {name: sorted(keys) for name, keys in other.keys.items()} == {
        name: sorted(keys) for name, keys in plan.keys.items()
    }
    PackedSequences(storage, other.fingerprint).read(0, SEQUENCES)


def test_another_mixture_makes_no_shard_of_a_given_tokenizer_anew(complete, recipe):
    storage, plan, _ = complete
    given = TokenizerRecipe(storage.path(plan.tokenizer))
    even = {name: replace(source, weight=1) for name, source in recipe.sources.items()}
    plans = [make_plan(replace(recipe, sources=sources), given, storage) for sources in (recipe.sources, even)]
    assert plans[0].units != plans[1].units
    assert plans[0].keys == plans[1].keys


def test_an_edited_input_is_another_order_and_never_mixed_in(complete, recipe, corpus, tmp_path):
    storage, plan, _ = complete
    moved = shutil.copytree(corpus, tmp_path / "moved")
    sources = {
        name: replace(source, path=source.path.replace(str(corpus), str(moved)))
        for name, source in recipe.sources.items()
    }
    given = TokenizerRecipe(storage.path(plan.tokenizer))
    before = make_plan(replace(recipe, sources=sources), given, storage)
    path = moved / "prose-1.jsonl"
    path.write_text(path.read_text().replace("counts 1", "counts 9"))  # same length
    after = make_plan(replace(recipe, sources=sources), given, storage)
    assert before.fingerprint == replace(plan, tokenizer_fingerprint=before.tokenizer_fingerprint).fingerprint
    assert after.fingerprint != before.fingerprint
    changed = [a != b for a, b in zip(after.keys["prose"], before.keys["prose"], strict=True)]
    assert sum(changed) == 1


def test_shards_are_read_through_the_cache_of_a_remote_root(complete, tmp_path):
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(complete[0].root, "/doge-test", recursive=True)
    try:
        reader = PackedSequences(Storage("memory://doge-test", cache=str(tmp_path)), complete[1].fingerprint)
        same(reader.read(0, SEQUENCES), complete[2])
        damaged = next(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000)
        damage(damaged, "truncated")
        again = PackedSequences(Storage("memory://doge-test", cache=str(tmp_path)), complete[1].fingerprint)
        same(again.read(0, SEQUENCES), complete[2])
    finally:
        remote.rm("/doge-test", recursive=True)
