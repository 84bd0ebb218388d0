"""A second Ray node runs in a mount namespace of its own, with an empty file system over the driver's directory."""

import contextlib
import functools
import hashlib
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch

from cluster.machines.head_storage import CHUNK_BYTES, FileServer, share
from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError
from doge.training.state.checkpoint import Checkpoints
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    """A directory that only the driver and tasks on its own node see."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def elsewhere(ray_cluster, hidden, tmp_path_factory):
    """Options that send a task to the node that does not see the hidden directory."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("the kernel allows no mount namespaces")
    folder = tmp_path_factory.mktemp("node")
    start = [
        Path(sys.executable).parent / "ray", "start", "--block", f"--address={ray_cluster.address}", "--num-cpus=2",
        "--resources={\"elsewhere\": 100}", "--disable-usage-stats",
        "--include-log-monitor=false",
    ]  # fmt: skip
    mount = f'mount -t tmpfs none {hidden} && exec "$@"'
    environment = {**os.environ, "DOGE_CACHE": str(folder / "cache")}
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(["unshare", "-rm", "sh", "-c", mount, "sh", *start], stdout=log, stderr=log, env=environment)
        as node,
    ):  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while "elsewhere" not in ray.cluster_resources():
                assert node.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.1)
            yield {"num_cpus": 0, "resources": {"elsewhere": 1}}
        finally:
            processes = psutil.Process(node.pid).children(recursive=True)
            raylets = [process for process in processes if process.name() == "raylet"]
            for raylet in raylets:
                raylet.terminate()  # it takes its leave, and need not be found missing
            psutil.wait_procs(raylets, 10)
            for process in [*processes, node]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            while "elsewhere" in ray.cluster_resources():  # no later test shall count on this node
                time.sleep(0.1)


@pytest.fixture
def root(hidden, request) -> Path:
    folder = hidden / str(abs(hash(request.node.name)))
    folder.mkdir()
    return folder


def on(options: dict, function, *arguments):
    return ray.get(ray.remote(function).options(**options).remote(*arguments))


def test_the_other_node_sees_nothing_of_the_directory(elsewhere, hidden, root):
    (root / "file").write_text("here")
    assert on(elsewhere, lambda: os.listdir(hidden)) == []


def test_every_operation_gives_there_what_it_gives_here(elsewhere, root):
    storage = share(Storage(str(root)))
    storage.write_bytes("from/here", b"one")

    def work(below: Storage):
        assert not below.is_local
        assert below.read_bytes("here") == b"one"
        assert (below.exists("here"), below.exists("nothing"), below.size("here")) == (True, False, 3)
        assert below.names("nothing") == []
        for absent in (below.read_bytes, below.size, below.local):
            with contextlib.suppress(FileNotFoundError):
                raise AssertionError(absent("nothing"))
        below.write_bytes("there", b"two")
        below.write_bytes("there", b"three")
        below.write_bytes("deep/er/empty", b"")
        below.write_bytes("gone", b"")
        below.delete("gone")
        below.delete("gone")

        def fill(content, path):
            os.makedirs(f"{path}/nested")
            Path(path, "nested/a").write_text(content)
            Path(path, content).write_text(content)

        for content in ("before", "after"):
            below.write("folder", functools.partial(fill, content))
            assert Path(below.local("folder/nested/a")).read_text() == content
        return below.names(), below.names("folder"), below.local("there")

    names, folder, copy = on(elsewhere, work, storage / "from")
    assert names == ["deep", "folder", "here", "there"]
    assert folder == ["after", "nested"]
    assert storage.is_local
    assert storage.names("from") == names
    assert storage.read_bytes("from/there") == b"three"
    assert storage.read_bytes("from/deep/er/empty") == b""
    assert not copy.startswith(str(root))
    assert storage.names() == ["from"]  # the marker is no file of ours
    assert sorted(os.listdir(root / "from")) == names  # nor is anything left half written


def test_where_the_directory_is_seen_it_is_used_in_place(ray_cluster, root):
    storage = share(Storage(str(root)))
    storage.write_bytes("a/file", b"x")

    def work(below: Storage):
        return below.is_local, below.local("file"), pickle.loads(pickle.dumps(below)).is_local

    here = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    assert on(here, work, storage / "a") == (True, str(root / "a/file"), True)


def test_a_storage_that_was_passed_on_still_finds_the_directory(elsewhere, root):
    """From the driver to a node that does not see it, and from there back to the driver's node."""
    storage = share(Storage(str(root)))

    def pass_on(below: Storage):
        here = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        return below.is_local, ray.get(ray.remote(lambda s: (s / "b").is_local).options(**here).remote(below))

    assert on(elsewhere, pass_on, storage / "a") == (False, True)


def test_large_files_travel_whole_in_pieces(elsewhere, root):
    storage = share(Storage(str(root)))
    size = 5 * CHUNK_BYTES + 12345

    def make(storage: Storage):
        content = os.urandom(size)
        storage.write_bytes("large", content)
        assert (
            storage._filesystem.cat_file(storage.path("large"), 10, CHUNK_BYTES + 20) == content[10 : CHUNK_BYTES + 20]
        )
        with storage._filesystem.open(storage.path("large")) as file:
            file.seek(-5, 2)
            assert file.read() == content[-5:]
        assert storage.read_bytes("large") == content
        return hashlib.sha256(Path(storage.local("large")).read_bytes()).hexdigest()

    assert on(elsewhere, make, storage) == hashlib.sha256((root / "large").read_bytes()).hexdigest()
    assert (root / "large").stat().st_size == size


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(elsewhere, root):
    storage = share(Storage(str(root)))
    versions = [bytes([letter]) * (CHUNK_BYTES + 1000 * letter) for letter in b"abc"]
    storage.write_bytes("file", versions[0])
    reading = ray.remote(lambda s: [len(set(s.read_bytes("file"))) for _ in range(5)]).options(**elsewhere)
    answer = reading.remote(storage)
    while not ray.wait([answer], timeout=0)[0]:
        for version in versions:
            storage.write_bytes("file", version)
            time.sleep(random.uniform(0, 0.2))
    assert set(ray.get(answer)) == {1}


def test_a_checkpoint_written_there_is_read_here_and_the_other_way_round(elsewhere, root):
    storage = share(Storage(str(root))) / "runs/x/checkpoints"

    def state(step: int) -> TrainState:
        weights = {"weight": torch.full((1000, 1000), float(step))}
        return TrainState(step, weights, {moment: dict(weights) for moment in MOMENTS})

    def work(storage: Storage):
        torch.set_num_threads(1)
        checkpoints = Checkpoints(storage, keep=2)
        found, _ = checkpoints.latest()
        assert found.step == 1
        assert torch.equal(found.parameters["weight"], state(1).parameters["weight"])
        for step in (2, 3):
            checkpoints.save(state(step), RunPosition("feed", "tokenizer", next_unit=step))
            checkpoints.wait()
        return checkpoints.steps()

    here = Checkpoints(storage)
    here.save(state(1), RunPosition("feed", "tokenizer"))
    here.wait()
    assert on(elsewhere, work, storage) == [2, 3]
    found, position = here.latest()
    assert (found.step, position.next_unit) == (3, 3)
    assert torch.equal(found.moments["exp_avg"]["weight"], state(3).parameters["weight"])


def test_a_writer_that_is_killed_there_leaves_the_last_commit(elsewhere, root):
    storage = share(Storage(str(root)))
    storage.write_bytes("folder/file", b"before")

    def die(storage: Storage):
        def fill(path):
            os.mkdir(path)
            Path(path, "first").write_bytes(b"half")
            Path(path, "second").write_bytes(b"half")

        put = storage._filesystem.put_file

        def killed(source, target, **options):
            put(source, target, **options)
            if os.path.isfile(source):
                os._exit(1)

        storage._filesystem.put_file = killed
        storage.write("folder", fill)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(ray.remote(die).options(**elsewhere, max_retries=0).remote(storage))
    assert storage.names() == ["folder"]
    assert storage.read_bytes("folder/file") == b"before"
    assert len([name for name in os.listdir(root) if name.endswith(".partial")]) == 1
    on(elsewhere, lambda s: s.sweep(), storage)
    assert [name for name in os.listdir(root) if name.endswith(".partial")] == []


def sentence(options: dict, storage: Storage, act) -> str:
    def work(storage):
        try:
            act(storage)
        except StorageError as error:
            return str(error)

    return on(options, work, storage)


def test_errors_of_the_head_are_the_same_sentences_there(elsewhere, root):
    """The kernel's full device serves as the full disk."""
    storage = share(Storage(str(root)))
    (root / "full").symlink_to("/dev/full")
    (root / "file").write_text("")
    act = lambda s: s._filesystem.put_file(__file__, s.path("full"))  # noqa: E731
    with pytest.raises(OSError, match="No space left"):
        on(elsewhere, act, storage)

    def write(storage):
        with storage._in_sentences():
            storage._filesystem.put_file("/proc/cpuinfo", storage.path("full"))

    assert sentence(elsewhere, storage, write).startswith(f"The disk that holds {root} is full: free some space")
    below_a_file = sentence(elsewhere, storage, lambda s: s.write_bytes("file/below", b""))
    assert below_a_file.startswith(f"The storage {root} cannot be used")
    outside = sentence(elsewhere, storage, lambda s: s.read_bytes("../../etc/passwd"))
    assert "lies outside" in outside


def test_a_root_that_vanishes_is_said_and_comes_back(elsewhere, root):
    storage = share(Storage(str(root)))
    storage.write_bytes("file", b"x")
    away = root.with_name("away")
    root.rename(away)
    root.mkdir()  # an unmounted disk leaves its empty mount point
    for act in (
        lambda s: s.write_bytes("file", b"y"), lambda s: s.names(), lambda s: s.exists("file"),
        lambda s: s.size("file"), lambda s: s.read_bytes("file"), lambda s: s.delete("file"), lambda s: s.sweep(),
    ):  # fmt: skip
        assert sentence(elsewhere, storage, act).startswith(f"The storage {root} has vanished")
        with pytest.raises(StorageError, match="has vanished"):
            act(storage)
    assert os.listdir(root) == []
    root.rmdir()
    away.rename(root)
    assert on(elsewhere, lambda s: s.read_bytes("file"), storage) == b"x"
    assert storage.read_bytes("file") == b"x"


def test_a_root_that_may_only_be_read_is_served_too(elsewhere, root, monkeypatch):
    (root / "file").write_text("x")
    plain = Storage(str(root))

    def refuse(*_):
        raise StorageError("read-only")

    monkeypatch.setattr(plain, "write_bytes", refuse)
    storage = share(plain)
    assert on(elsewhere, lambda s: s.read_bytes("file"), storage) == b"x"
    assert storage.read_bytes("file") == b"x"


def test_a_server_that_crashes_is_started_again(elsewhere, root):
    storage = share(Storage(str(root)))
    storage.write_bytes("file", b"x")
    ray.kill(storage._arguments[1].server, no_restart=False)
    assert on(elsewhere, lambda s: s.read_bytes("file"), storage) == b"x"


def test_a_driver_that_is_gone_is_one_sentence(elsewhere, root):
    storage = share(Storage(str(root)))
    ray.kill(storage._arguments[1].server)
    said = sentence(elsewhere, storage, lambda s: s.read_bytes("file"))
    assert said.endswith("is gone: run the same command to resume from the last commit.")


def test_the_marker_goes_with_the_driver(ray_cluster, root):
    storage = share(Storage(str(root)))
    assert share(storage) is storage
    assert len(os.listdir(root)) == 1
    del storage
    assert os.listdir(root) == []


def test_shards_are_made_and_read_where_the_directory_is_not_seen(elsewhere, root, texts):
    """Ray Data's tasks run on either node; the reader runs on the one that sees nothing, and reads the same."""
    from small_runs import small_recipe

    from data_pipelines.order.packed_sequences import PackedSequences
    from data_pipelines.order.plan import make_plan
    from data_pipelines.prepare import prepare

    recipe = small_recipe(root, texts)
    storage = share(Storage(str(root)))
    plan = make_plan(recipe.data, recipe.tokenizer, storage)

    def work(storage: Storage):
        assert not storage.is_local
        prepare(plan, storage, 100)
        return PackedSequences(storage, plan.fingerprint).read(0, 50).tokens

    there = on(elsewhere, work, storage)
    assert (there == PackedSequences(storage, plan.fingerprint).read(0, 50).tokens).all()


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../x", "{root}x", "{root}/a/../../x", "", "/"])
def test_the_server_serves_nothing_outside_its_root(path, tmp_path):
    server = FileServer(str(tmp_path))
    path = path.format(root=tmp_path)
    for act in (
        lambda: server.info(path), lambda: server.list(path), lambda: server.read(path, 0, 1),
        lambda: server.create(path), lambda: server.write(path, 0, b"x"), lambda: server.makedirs(path, True),
        lambda: server.commit(path, f"{tmp_path}/x"), lambda: server.commit(f"{tmp_path}/x", path),
        lambda: server.remove(path, True),
    ):  # fmt: skip
        with pytest.raises(PermissionError, match="lies outside"):
            act()
    with pytest.raises(PermissionError, match="is the root"):
        server.remove(str(tmp_path), True)


def test_the_cache_is_private_to_its_user(monkeypatch, tmp_path):
    monkeypatch.delenv("DOGE_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = Storage("memory://private")
    storage.write_bytes("a", b"x")
    copy = Path(storage.local("a"))
    cache = tmp_path / f"doge-cache-{os.getuid()}"
    assert copy.is_relative_to(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"doge-cache-{os.getuid()}").mkdir()  # another user was first
    with pytest.raises(UserError, match="belongs to another user: set DOGE_CACHE"):
        Storage("memory://private").write_bytes("a", b"x")
