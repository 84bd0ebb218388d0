"""Paths and URIs as people write them, and names of runs: taken literally everywhere, or refused in one sentence."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict
from doge.common.errors import UserError
from doge.common.paths import is_relative, plain_path
from doge.common.storage import Storage
from doge.reporting.tracking import TrackingRecipe
from doge.tokenizer.loading import load_tokenizer
from jobs.command import find_recipe

ODD = ["two words", "no#1", "100%", "a%20b", "what?", "a::b", "[x]*", "é日", "cost$_$x", "back\\slash", "semi;colon&"]


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("file:///data/doge", "/data/doge"),
        ("file://localhost/data/doge", "/data/doge"),
        ("file:/data/doge", "/data/doge"),
        ("FILE:///data/doge", "/data/doge"),
        ("local:///data/doge", "/data/doge"),
        ("file:///data/my%20doge%231", "/data/my doge#1"),
        ("file:///data/my doge#1?100%", "/data/my doge#1?100%"),
        ("file://~/doge", "/home/me/doge"),
        ("~/doge", "/home/me/doge"),
        ("org/tokenizer", "org/tokenizer"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
    ],
)
def test_a_place_becomes_the_path_that_it_names(place, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert plain_path(place) == path


@pytest.mark.parametrize("place", ["file://doge", "file:doge", "file://", "~no-such-user/doge"])
def test_a_place_that_names_no_path_is_refused(place):
    with pytest.raises(UserError, match=r"no absolute path: write file:///|home directory that does not exist"):
        Storage(place)


def test_a_file_uri_is_the_same_storage_as_its_path(tmp_path):
    storage = Storage(f"file://{tmp_path}/home")
    assert (storage.root, storage.path("x")) == (f"{tmp_path}/home", f"{tmp_path}/home/x")
    assert Storage((tmp_path / "my home").as_uri()).root == f"{tmp_path}/my home"


@pytest.mark.parametrize("name", ODD)
def test_a_directory_of_any_name_is_a_storage(name, tmp_path):
    storage = Storage(str(tmp_path / name)) / f"runs/{name}"
    storage.write_bytes("model/a", b"1")
    assert (tmp_path / name / "runs" / name / "model/a").read_bytes() == b"1"
    assert (storage.read_bytes("model/a"), storage.names("model")) == (b"1", ["a"])
    assert Path(storage.local("model/a")).read_bytes() == b"1"
    storage.delete("model")
    assert storage.names() == []


@pytest.mark.parametrize("name", ODD)
def test_a_run_of_any_name_lies_in_an_object_store(name, tmp_path):
    root = Storage(f"memory://places-{ODD.index(name)}", cache=str(tmp_path))
    run, neighbour = root / f"runs/{name}", root / "runs/xb"
    for storage in (run, neighbour):
        storage.write_bytes("model/a", b"1")
    again = pickle.loads(pickle.dumps(run))
    assert (again.root, again.read_bytes("model/a")) == (run.root, b"1")
    run.delete("model")
    assert (run.names("model"), neighbour.names("model")) == ([], ["a"])


def test_a_tokenizer_and_a_recipe_are_places_too(tmp_path):
    with pytest.raises(UserError, match=f"The tokenizer '{tmp_path}/no one' is no directory"):
        load_tokenizer(f"file://{tmp_path}/no%20one")
    assert find_recipe(f"file://{tmp_path}/my%20recipe.yaml") == tmp_path / "my recipe.yaml"


def test_a_web_address_is_no_storage():
    with pytest.raises(UserError, match=r"web address, where nothing can be written: give a directory"):
        Storage("https://example.com/doge")


@pytest.mark.parametrize("opened", [Storage, load_tokenizer, plain_path])
def test_a_uri_with_a_slash_too_few_is_no_directory_here(opened):
    with pytest.raises(UserError, match=r"s3:/bucket/doge has one slash after s3: where two belong: write s3://"):
        opened("s3:/bucket/doge")


def test_a_directory_whose_name_looks_like_a_uri_is_taken_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes:" / "a").mkdir(parents=True)
    assert plain_path("notes:/a") == "notes:/a"


def test_where_nothing_can_be_made_is_one_sentence():
    with pytest.raises(UserError, match=r"The storage /proc/doge cannot be used .*: choose one"):
        Storage("/proc/doge").write_bytes("a", b"")


def test_a_path_that_no_file_system_takes_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="too long"):
        Storage(str(tmp_path / ("x" * 300))).write_bytes("a", b"")


@pytest.mark.parametrize("name", [name for name in ODD if "/" not in name] + ["ä" * 100, "-x", " x"])
def test_a_run_may_have_any_name_that_a_directory_may_have(name):
    from_dict(Recipe, {"name": name}).check()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "must be a plain name"),
        ("..", "must be a plain name"),
        ("a/b", "must be a plain name"),
        ("two\nlines", "cannot be printed"),
        ("bell\x07", "cannot be printed"),
        ("\udcff", "cannot be printed"),
        ("x" * 201, "201 bytes long"),
        ("ä" * 101, "202 bytes long"),
        ("run.partial", "choose another ending"),
    ],
)
def test_a_name_that_no_directory_can_have_is_refused_at_the_start(name, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(Recipe(), name=name).check()


def test_a_storage_without_a_name_is_refused():
    with pytest.raises(UserError, match="storage is empty"):
        Recipe(storage="").check()


@pytest.mark.parametrize("place", ["out", "./out", "../out", "/tmp/ray/s/working_dir_files/_ray_pkg_0f/out"])
def test_nothing_durable_lies_in_rays_copy_of_the_working_directory(place, monkeypatch):
    Recipe(storage=place).check()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"storage = .* Ray makes for a submitted job, and deletes later: give"):
        Recipe(storage=place).check()
    with pytest.raises(UserError, match=r"tracking\.uri = "):
        Recipe(storage="/data", tracking=TrackingRecipe(uri=f"sqlite:///{place}/mlflow.db")).check()
    for lasting in ("/data/doge", "~/doge", "file:///data/doge", "s3://bucket/doge"):
        Recipe(storage=lasting).check()


def test_what_depends_on_the_working_directory_is_relative():
    assert [is_relative(place) for place in ("out", "/out", "~/out", "file:///out", "s3://out")] == [True] + 4 * [False]
