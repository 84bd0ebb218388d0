"""A part of a file is the same wherever reading began, and reading all parts takes one pass over the file."""

import bz2
import gzip
import json
import lzma
import random
from dataclasses import replace

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipelines.order.catalog import Catalog
from data_pipelines.order.plan import make_plan
from data_pipelines.prepare import PartRange, part_ranges
from data_pipelines.sources import layouts
from data_pipelines.sources.files import list_files
from data_pipelines.sources.rows import Unreadable, make_documents, read_parts
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.shards import record_name
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe

SIZE = 7
QUOTED = 'ü, \\ "'
ROWS = [
    {"meta": {"of": [number, {"a": "]"}]}, "text": f"{number}: {QUOTED * (number * 5 % 41)}"} for number in range(60)
]
LINES = "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n\n" for number, row in enumerate(ROWS)).encode()
LISTED = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
PACK = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda content: b"".join(pa.compress(half, "zstd", asbytes=True) for half in (content[:99], content[99:])),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(layouts, "_BLOCK", 256)
    monkeypatch.setattr(layouts, "_BATCH", 4)


def source_of(path):
    source = SourceRecipe(str(path), 1)
    (file,) = list_files("a", source)
    return source, file


def written(folder, name):
    if name.endswith(".parquet"):
        groups = 1000 if "one-group" in name else 9
        parquet.write_table(pa.table({"text": [row["text"] for row in ROWS]}), folder / name, row_group_size=groups)
    else:
        content = LINES if ".jsonl" in name or "lines" in name else LISTED
        compression = "." + name.rsplit(".", 1)[-1]
        (folder / name).write_bytes(PACK.get(compression, bytes)(content))
    return source_of(folder / name)


NAMES = [f"a{layout}{compression}" for layout in (".jsonl", ".json") for compression in PACK]
NAMES += ["lines.json", "lines.json.gz", "one-group.parquet", "groups.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_the_same_wherever_reading_begins(tmp_path, name):
    source, file = written(tmp_path, name)
    parts = list(read_parts(source, file, SIZE))
    texts = [text for part in parts for text in make_documents(source, file, part).documents]
    assert texts == [row["text"] for row in ROWS]
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    for number in range(1, len(parts)):
        for offset in {0, parts[number - 1].end}:
            assert list(read_parts(source, file, SIZE, number, offset)) == parts[number:]
    assert list(read_parts(source, file, SIZE, len(parts))) == []
    assert [part.last for part in read_parts(source, file, len(ROWS))] == [True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_part_of_a_plain_file_is_found_without_what_is_before_it(tmp_path, monkeypatch, name):
    source, file = written(tmp_path, name)
    parts = list(read_parts(source, file, SIZE))
    read, real = [], layouts._Reached.read
    monkeypatch.setattr(layouts._Reached, "read", lambda *args: read.append(real(*args)) or read[-1])
    assert next(read_parts(source, file, SIZE, 6, parts[5].end)) == parts[6]
    assert sum(map(len, read)) < (tmp_path / name).stat().st_size / 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.xz", "a.jsonl.bz2"])
def test_the_same_rows_of_a_damaged_file_are_lost_wherever_reading_begins(tmp_path, name):
    random.seed(1)
    rows = [{"text": random.randbytes(40).hex()} for _ in range(100)]
    content = "\n".join(map(json.dumps, rows)).encode() if "jsonl" in name else json.dumps(rows).encode()
    packed = PACK["." + name.rsplit(".", 1)[-1]](content)
    (tmp_path / name).write_bytes(packed[: len(packed) * 2 // 3])
    source, file = source_of(tmp_path / name)
    with pytest.raises(Unreadable, match=f"{name} cannot be read .*--data.skip-unreadable"):
        list(read_parts(source, file, SIZE))
    parts = list(read_parts(source, file, SIZE, skip_unreadable=True))
    assert (parts[-1].rows, parts[-1].last) == ([], True)
    assert f"{name} cannot be read" in parts[-1].skipped
    for number in range(1, len(parts)):
        for offset in {0, parts[number - 1].end}:
            assert list(read_parts(source, file, SIZE, number, offset, skip_unreadable=True)) == parts[number:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "groups.parquet"])
def test_a_filesystem_that_fails_damages_no_file(tmp_path, name, monkeypatch):
    source, file = written(tmp_path, name)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/away/{name}", (tmp_path / name).read_bytes())
    try:
        source, file = source_of(f"memory://away/{name}")
        monkeypatch.setattr("data_pipelines.sources.rows.check_unchanged", lambda *args: None)
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", broken, raising=False)
        with pytest.raises(UserError, match=f"{name} cannot be reached .*the line is down.*run the same command"):
            list(read_parts(source, file, SIZE, skip_unreadable=True))
    finally:
        memory.rm("/away", recursive=True)


def broken(*args):
    raise OSError("the line is down")


ODD = {
    '{"meta": 1}': "has no column 'text', only meta",
    "{}": "has no column 'text', only an empty object",
    '{"text": NaN}': "holds float in 'text' and no text",
    '{"text": ["a"]}': "holds list in 'text' and no text",
    "null": "is null and no object",
    "[1, 2]": r"is \[1, 2\] and no object",
    '{"text": "b", "meta": ' + "[" * 10**5 + "]" * 10**5 + "}": "is nested too deep",
    '{"text": "b" "c"}': "is not JSON ",
    '{"text": "\xff"}': "is not UTF-8 ",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("row", ODD)
def test_an_odd_row_is_named_and_left_out_alone(tmp_path, name, row):
    rows = ['{"text": "a"}', '{"text": null}', row, '{"text": "z"}']
    content = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    source, file = source_of(tmp_path / name)
    (part,) = read_parts(source, file, 10)
    with pytest.raises(Unreadable, match=rf"Row 3 of .*{name} {ODD[row]}.*skip-unreadable"):
        make_documents(source, file, part)
    made = make_documents(source, file, part, skip_unreadable=True)
    assert (made.documents, len(made.rows), len(made.skipped)) == (["a", "", "z"], 3, 1)


def test_a_last_line_that_is_cut_is_an_odd_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 1000 + '{"text": "b')
    source, file = source_of(tmp_path / "a.jsonl")
    (part,) = read_parts(source, file, 4096)
    with pytest.raises(Unreadable, match=r"Row 1,001 of .*a\.jsonl is not JSON"):
        make_documents(source, file, part)
    assert make_documents(source, file, part, skip_unreadable=True).documents == ["a"] * 1000


def test_every_odd_row_of_a_conversation_is_left_out(tmp_path):
    rows = [{"prompt": "p" if number % 3 else 1, "text": "t" if number % 5 else 2} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, file = source_of(tmp_path / "a.jsonl")
    source = replace(source, format="conversation")
    (part,) = read_parts(source, file, 40)
    made = make_documents(source, file, part, skip_unreadable=True)
    odd = [number + 1 for number in range(40) if number % 3 == 0 or number % 5 == 0]
    assert [int(sentence.split()[1]) for sentence in made.skipped] == odd
    assert len(made.documents) == 40 - len(odd)


def test_text_in_a_parquet_file_that_is_not_utf_8_is_an_odd_row(tmp_path):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffz"))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    source, file = source_of(tmp_path / "a.parquet")
    (part,) = read_parts(source, file, 10)
    with pytest.raises(Unreadable, match=r"Row 2 of .*a\.parquet cannot be read \(UnicodeDecodeError"):
        make_documents(source, file, part)
    assert make_documents(source, file, part, skip_unreadable=True).documents == ["a", "z"]


@pytest.mark.parametrize("values", [[1, 2], [[1], [2]], [b"a", b"b"]])
def test_a_parquet_column_of_another_type_is_the_recipes_fault(tmp_path, values):
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    source, file = source_of(tmp_path / "a.parquet")
    (part,) = read_parts(source, file, 10)
    with pytest.raises(
        UserError, match=r"Row 1 of .*a\.parquet holds .* and no row is better: set the source's columns"
    ):
        make_documents(source, file, part, skip_unreadable=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = {"a.jsonl": '{"text": "a"}\n', "a.json": ' [{"text": "a"}]', "a.txt": "a"}[name]
    (tmp_path / name).write_text(text, "utf-8-sig")
    source, file = source_of(tmp_path / name)
    (part,) = read_parts(source, file, 10)
    assert make_documents(source, file, part).documents == ["a"]


def test_missing_parts_are_read_in_ranges_in_the_order_of_need():
    addresses = [("a", 0, 4), ("b", 0, 0), ("a", 1, 4), ("a", 0, 5), ("a", 0, 7), ("b", 0, 1), ("a", 0, 8)]
    assert part_ranges(addresses) == [
        PartRange("a", 0, 4, 2), PartRange("b", 0, 0, 2), PartRange("a", 1, 4, 1), PartRange("a", 0, 7, 2)
    ]  # fmt: skip


def test_each_shard_is_read_from_where_the_one_before_ends(tmp_path, monkeypatch):
    written(tmp_path, "a.jsonl")
    recipe = DataRecipe(
        {"a": SourceRecipe(str(tmp_path / "a.jsonl"), 1)},
        sequence_length=16,
        held_out_sequences=0,
        documents_per_shard=SIZE,
    )
    storage = Storage(str(tmp_path / "store"))
    plan = make_plan(recipe, TokenizerRecipe(vocab_size=300, training_bytes=2000), storage)
    tokenizer = plan.open_tokenizer(storage)
    read, real = [], layouts._Reached.read
    monkeypatch.setattr(layouts._Reached, "read", lambda *args: read.append(real(*args)) or read[-1])
    records = []
    while not records or not records[-1].last:
        records.append(plan.make_shard(storage, "a", 0, len(records), tokenizer))
    assert sum(record.documents for record in records) == len(ROWS)
    assert sum(map(len, read)) < 2 * len(LINES)  # each part looks a row ahead
    again = plan.make_shard(storage, "a", 0, 4, tokenizer)
    storage.delete(record_name(plan.keys["a"][0], 3))
    assert again == plan.make_shard(storage, "a", 0, 4, tokenizer) == records[4]


def test_an_odd_row_is_counted_in_the_record_of_its_shard(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9 + '{"text": 7}\n' + '{"text": "more words"}\n' * 9)
    recipe = DataRecipe({"a": SourceRecipe(str(tmp_path), 1)}, sequence_length=16, held_out_sequences=0)
    storage = Storage(str(tmp_path / "store"))
    plan = make_plan(replace(recipe, skip_unreadable=True), TokenizerRecipe(vocab_size=300), storage)
    record = plan.make_shard(storage, "a", 0, 0, plan.open_tokenizer(storage))
    assert (record.documents, record.skipped_rows) == (18, 1)
    assert "Row 10 of" in record.skipped
    strict = replace(plan, recipe=recipe)
    assert Catalog(plan, storage)("a", 0, 0) == record
    assert Catalog(strict, storage)("a", 0, 0) is None  # who skips nothing does not take it for prepared
    with pytest.raises(Unreadable, match=r"Row 10 of .*a\.jsonl"):
        strict.make_shard(storage, "a", 0, 0, plan.open_tokenizer(storage))
