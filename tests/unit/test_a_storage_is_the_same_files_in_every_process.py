import pickle
from dataclasses import dataclass

import cloudpickle
import pytest

from cluster.machines.head_storage import HeadFileSystem
from doge.common.lease import Claim
from doge.common.storage import Storage


@dataclass
class Task:
    storage: Storage


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: s / "runs", Task, lambda s: Claim(s, "me"), lambda s: lambda: s]
)
def test_a_plain_directory_is_refused_by_name(wrap, tmp_path):
    for root in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(
            pickle.PicklingError, match=r"Storage\('.*'\) is a directory .*head_storage.share makes of it"
        ):
            cloudpickle.dumps(wrap(Storage(root)))


def test_a_remote_storage_travels_as_it_is(tmp_path):
    storage = Storage("memory://bucket", cache=str(tmp_path)) / "runs"
    storage.write_bytes("file", b"x")
    there = pickle.loads(pickle.dumps(storage))
    assert (there.root, there.is_local, there.read_bytes("file")) == ("memory://bucket/runs", False, b"x")


def test_a_shared_one_travels_on_from_where_it_was_opened_in_place(tmp_path):
    marker = tmp_path / ".seen.shared"
    marker.touch()
    storage = Storage(str(tmp_path), filesystem=HeadFileSystem(None, "head"), marker=str(marker)) / "runs"
    for _ in range(2):
        storage = pickle.loads(pickle.dumps(storage))
        assert (storage.is_local, storage.root) == (True, f"{tmp_path}/runs")
    marker.unlink()  # as on a machine that does not see the directory
    assert not pickle.loads(pickle.dumps(storage)).is_local
