"""Every file of a source is found, however it is named or linked, and what is left out of a place is said once."""

import gzip
import logging
import os
import zipfile
from pathlib import Path

import fsspec
import pytest

from data_pipelines.sources.files import list_files
from data_pipelines.sources.rows import make_documents, read_parts
from data_pipelines.sources.source_recipe import SourceRecipe
from doge.common.errors import UserError


def put(path, text="here"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"text": "{text}"}}\n')
    return path


def listed(place):
    """The paths of the files at a place, each of which can be read."""
    source = SourceRecipe(str(place), 1)
    files = list_files("a", source)
    for file in files:
        (part,) = read_parts(source, file, 10)
        assert make_documents(source, file, part).documents
    return [file.path.removeprefix("file://") for file in files]


def test_hidden_counts_only_below_the_place(tmp_path, caplog):
    shown, hidden = (
        put(tmp_path / ".store" / "data" / "a.jsonl"),
        put(tmp_path / ".store" / "data" / ".git" / "b.jsonl"),
    )
    assert listed(tmp_path / ".store") == [str(shown)]
    assert listed(f"{tmp_path}/.store/*/*.jsonl") == [str(shown)]
    assert listed(f"{tmp_path}/.store/data/.g*/*.jsonl") == listed(hidden) == [str(hidden)]


def test_links_are_followed_and_end(tmp_path):
    content, other = put(tmp_path / "blobs" / "1f2e"), put(tmp_path / "elsewhere" / "b.jsonl")
    top = tmp_path / "top"
    own = put(top / "deep" / "own.jsonl")
    (top / "a.jsonl").symlink_to("../blobs/1f2e")
    (top / "out").symlink_to(other.parent)
    for back in (top / "deep" / "up", other.parent / "home"):
        back.symlink_to(top)
    (top / "again").symlink_to("deep")
    expected = [str(top / "a.jsonl"), str(own), str(top / "out" / "b.jsonl")]
    assert listed(top) == listed(f"{top}/**/*.jsonl") == expected
    assert listed(f"{top}/*/*.jsonl") == expected[1:]
    assert listed(top / "a.jsonl") == expected[:1]
    assert content.read_bytes() == (top / "a.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["[en] web", "who?", "a*b", "x::y", "50% #1", "[", "über"])
def test_a_name_that_exists_is_taken_as_it_is_written(tmp_path, name, monkeypatch):
    put(tmp_path / "e" / "a.jsonl")
    for path in (put(tmp_path / name / "a.jsonl"), put(tmp_path / f"{name}.jsonl")):
        assert listed(path) == listed(f"file://{path}") == [str(path)]
    inside = [str(tmp_path / name / "a.jsonl")]
    assert listed(tmp_path / name) == listed(f"{tmp_path}/{name}/*.jsonl") == inside
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert listed(f"~/{name}") == listed(f"./{name}") == listed(f"~/{name}/*") == inside


@pytest.mark.parametrize(
    "name", ["books.txt.jsonl", "wiki.txt-00001.jsonl", "a.jsonl.old.txt", "B.JSONL", "c.Jsonl.GZ"]
)
def test_the_ending_alone_says_what_a_file_is(tmp_path, name):
    content = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    source = SourceRecipe(str(tmp_path), 1)
    (file,) = list_files("a", source)
    (part,) = read_parts(source, file, 10)
    expected = [content.decode()] if name.endswith(".txt") else ["one", "two"]
    assert make_documents(source, file, part).documents == expected


def test_what_is_left_out_is_said_in_one_sentence(tmp_path, caplog):
    put(tmp_path / "a.jsonl")
    for name in ("README.md", "b.csv", "c.csv", "d.csv", ".hidden.jsonl"):
        put(tmp_path / name)
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path) == [str(tmp_path / "a.jsonl")]
    assert [record.getMessage() for record in caplog.records] == [
        f"The source a ({tmp_path}) leaves out 4 with another ending (README.md, b.csv, c.csv, …), 1 hidden "
        "(.hidden.jsonl), 1 linked to nowhere (gone.jsonl) and 1 neither file nor directory (pipe.jsonl)."
    ]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file at .*only 4 with another ending .*--data\.sources\.a\.path"):
        listed(tmp_path)


def test_every_file_system_is_listed_alike(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/listing/.up/in [1]/a.jsonl": b'{"text": "a"}', "/listing/.up/in [1]/.b.jsonl": b'{"text": "b"}'})
    try:
        expected = ["memory:///listing/.up/in [1]/a.jsonl"]
        for place in ("memory://listing/.up", "memory://listing/.up/in [1]/*", "memory://listing/.up/i*/a*"):
            assert listed(place) == expected
        assert listed("simplecache::memory://listing/.up/*/*.jsonl") == [f"simplecache::{expected[0]}"]
    finally:
        memory.rm("/listing", recursive=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.jsonl", '{"text": "a"}')
    for place in ("zip://in/*.jsonl", "zip://", "zip"):
        uri = f"{place}::file://{tmp_path}/a.zip"
        assert [Path(path.split("::")[0]).name for path in listed(uri)] == ["a.jsonl"]


def test_a_source_is_a_place_as_a_storage_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "my text" / "a.jsonl")
    for place in (f"file://{tmp_path}/my%20text", "~/my text/*.jsonl", f"file:{tmp_path}/my%20text/a.jsonl"):
        assert listed(place) == [f"{tmp_path}/my text/a.jsonl"]
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "~me" / "a.jsonl")  # what exists is taken as it is written
    assert listed("~me") == [f"{tmp_path}/~me/a.jsonl"]
    for place, sentence in (("~no-such-user/a", "home directory that does not exist"), ("s3:/a/b", "one slash after")):
        with pytest.raises(UserError, match=sentence):
            listed(place)


def test_a_web_server_that_does_not_answer_is_not_taken_for_an_empty_one():
    with pytest.raises(UserError, match=r"The source a \(http://127\.0\.0\.1:9/x/\) cannot be reached"):
        listed("http://127.0.0.1:9/x/")
