"""Local files laid out as on the hub are read by part, and what cannot be read is named in one sentence."""

import gzip
import http.server
import json
import threading
from contextlib import contextmanager

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipelines.formats.base import Turn
from data_pipelines.formats.software_heritage import fetch_blobs
from data_pipelines.sources.files import _pin_revision, list_files
from data_pipelines.sources.rows import Unreadable, make_documents, read_parts
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from doge.common.errors import UserError


def texts(source, file, size=10**9, first=0, skip=False):
    """The documents of part ``first``; none if the file ends before it."""
    part = next(read_parts(source, file, size, first, skip_unreadable=skip), None)
    return make_documents(source, file, part, skip).documents if part else []


def write_parquet(path, columns, row_group_size=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


def test_fineweb_edu_is_read_by_part_across_row_groups(tmp_path):
    words = [f"document {number}" for number in range(10)]
    metadata = [{"dump": "CC-MAIN-2020-05", "url": "http://a", "token_count": 7, "score": 3.1}] * 10
    write_parquet(
        tmp_path / "fineweb-edu-dedup" / "train-00000-of-00234.parquet",
        {"text": words, "id": [str(number) for number in range(10)], "metadata": metadata},
    )
    source = SourceRecipe(str(tmp_path / "fineweb-edu-dedup" / "*.parquet"), 7)
    (file,) = list_files("web", source)
    assert texts(source, file) == words
    for size in range(1, 12):
        for part in range(12):
            assert texts(source, file, size, part) == words[part * size : (part + 1) * size]


def test_cosmopedia_becomes_prompt_and_text(tmp_path):
    columns = {"prompt": ["Write a story."], "text": ["Once."], "token_length": [2], "audience": ["children"]}
    write_parquet(tmp_path / "train-00000-of-00104.parquet", columns | {"format": ["story"], "seed_data": ["stanford"]})
    source = SourceRecipe(str(tmp_path), 2, "conversation")
    (file,) = list_files("cosmopedia", source)
    assert texts(source, file) == [(Turn("user", "Write a story."), Turn("assistant", "Once."))]


@contextmanager
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_python_edu_is_fetched_from_software_heritage(tmp_path):
    blobs = {f"{number:040x}": f"print({number})  # é\n" for number in range(30)}
    (tmp_path / "content").mkdir()
    for blob_id, text in blobs.items():
        (tmp_path / "content" / blob_id).write_bytes(gzip.compress(text.encode()))
    missing = "f" * 40
    ids = [*blobs, missing]
    columns = {"blob_id": ids, "repo_name": ["a/b"] * 31, "path": ["/x.py"] * 31, "length_bytes": [12] * 31}
    write_parquet(
        tmp_path / "python-edu" / "train-00000-of-00001.parquet", columns | {"score": [4.0] * 31, "int_score": [4] * 31}
    )
    with served(tmp_path) as url:
        source = SourceRecipe(str(tmp_path / "python-edu"), 0.5, "software-heritage", blob_url=f"{url}/content")
        (file,) = list_files("python", source)
        assert texts(source, file) == [*blobs.values(), ""]
        assert texts(source, file, 2, 2) == list(blobs.values())[4:6]


def test_an_unreachable_blob_store_is_a_sentence(monkeypatch):
    from urllib3.util.retry import Retry

    monkeypatch.setattr(Retry, "sleep", lambda self, response=None: None)
    with pytest.raises(UserError, match=r"cannot be fetched from http://127\.0\.0\.1:9/"):
        fetch_blobs("http://127.0.0.1:9/", ["a"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_layout_gives_the_same_rows(tmp_path, name):
    rows = [{"text": f"text {number}\nwith lines", "other": number} for number in range(7)]
    if name == "a.parquet":
        write_parquet(tmp_path / name, {"text": [row["text"] for row in rows]})
    else:
        lines = "\n\n".join(map(json.dumps, rows)) if ".jsonl" in name else json.dumps(rows)
        content = lines.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = SourceRecipe(str(tmp_path / name), 1)
    (file,) = list_files("a", source)
    assert texts(source, file) == [row["text"] for row in rows]
    assert texts(source, file, 3, 1) == [row["text"] for row in rows[3:6]]
    assert texts(source, file, 7, 1) == []


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    source = SourceRecipe(str(tmp_path), 1)
    assert [texts(source, file) for file in list_files("a", source)] == [["one\n\ntwo\n"], ["three"]]


def test_identity_follows_content_and_not_place_or_time(tmp_path):
    def identity(path):
        return list_files("a", SourceRecipe(str(path), 1))[0].identity

    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("abc")
    second.write_text("abc")
    assert identity(first) == identity(second)
    second.write_text("abd")
    assert identity(first) != identity(second)


def test_a_file_that_changes_after_listing_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    source = SourceRecipe(str(path), 1)
    (file,) = list_files("a", source)
    path.write_text('{"text": "two, longer"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        texts(source, file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 not really"),
        ("a.parquet", b""),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "cut off"}\n' * 1000, mtime=0)[:40]),
        ("a.jsonl", b'{"text": "good"}\n{"text": '),
        ("a.jsonl", b"[1]\n"),
        ("a.json", b'"no list"'),
        ("a.json", b'[{"text": "no end"}, '),
        ("a.json", b'[{"text": "a list"}] [{"text": "and another"}]'),
        ("a.txt", b"\xff\xfe"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    with pytest.raises(Unreadable, match=name.replace(".", r"\.")):
        texts(source, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"content": "a"}\n' * 2, r"Row 1 of .*a\.jsonl has no column 'text', only content, and no row is better"),
        (b'{"text": 7}\n' * 2, r"Row 1 of .*a\.jsonl holds int in 'text' and no text, and no row is better"),
    ],
)
def test_a_wrong_column_is_named_and_never_skipped(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    with pytest.raises(UserError, match=message) as error:
        texts(source, file, skip=True)
    assert not isinstance(error.value, Unreadable)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n')
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    assert texts(source, file) == ["a? b"]


@pytest.mark.parametrize("path", ["/nowhere/*.parquet", "s3://", "nosuchscheme://a/*.parquet"])
def test_a_source_that_cannot_be_reached_says_how_to_point_elsewhere(path):
    with pytest.raises(UserError, match=r"--data\.sources\.web\.path"):
        list_files("web", SourceRecipe(path, 1))


def test_an_offline_hub_says_how_to_point_at_local_files(monkeypatch):
    from huggingface_hub import HfFileSystem

    def offline(self, *arguments, **keywords):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfFileSystem, "resolve_path", offline)
    source = SourceRecipe("hf://datasets/HuggingFaceTB/smollm-corpus/fineweb-edu-dedup/*.parquet", 7)
    with pytest.raises(UserError, match=r"no route to host.*--data\.sources\.web\.path") as error:
        list_files("web", source)
    assert "\n" not in str(error.value)


def test_a_hub_path_is_pinned_to_todays_commit(monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub import HfApi, HfFileSystem

    def resolve_path(self, path):
        owner, name, *inside = path.removeprefix("hf://datasets/").split("/")
        name, _, revision = name.partition("@")
        return SimpleNamespace(
            repo_id=f"{owner}/{name}", repo_type="dataset", revision=revision or "main", path_in_repo="/".join(inside)
        )

    commits = {"main": "c0ffee", "v2": "beef"}
    monkeypatch.setattr(HfFileSystem, "resolve_path", resolve_path)
    monkeypatch.setattr(
        HfApi, "repo_info", lambda self, repo_id, repo_type, revision: SimpleNamespace(sha=commits[revision])
    )
    for revision, commit in (("", "c0ffee"), ("@v2", "beef")):
        path = f"hf://datasets/HuggingFaceTB/finemath{revision}/finemath-4plus/*.parquet"
        assert _pin_revision(path) == f"hf://datasets/HuggingFaceTB/finemath@{commit}/finemath-4plus/*.parquet"
    assert _pin_revision("/data/*.parquet") == "/data/*.parquet"


@pytest.mark.parametrize("values", [{"sequence_length": 1}, {"documents_per_shard": 0}, {"num_cpus_per_task": -1.0}])
def test_impossible_recipes_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        DataRecipe(**values)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_another_encoding_than_utf8_is_told_of_the_first_row(tmp_path, encoding, name):
    rows = [json.dumps({"text": f"Übermorgen {number}"}, ensure_ascii=False) for number in range(3)]
    content = f"[{','.join(rows)}]" if name == "a.json" else "\n".join(rows)
    (tmp_path / name).write_bytes(content.encode(encoding))
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    with pytest.raises(Unreadable, match=r"Row 1 of \S+ is not (UTF-8|JSON) "):
        texts(source, file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.txt"])
def test_a_clone_without_its_large_files_says_what_to_run(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 123456\n"
    (tmp_path / name).write_text(pointer)
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    with pytest.raises(Unreadable, match=rf"{name} cannot be read \(GitLfsPointer: it stands .* `git lfs pull`"):
        texts(source, file)
