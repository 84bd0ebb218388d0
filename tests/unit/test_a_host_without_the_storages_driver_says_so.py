"""A host opens the storage when it is sent the job, before all else: one whose packages lack the driver says which."""

import pickle
import sys

import pytest

from cluster.elastic.workload import Job
from doge.common.errors import MachineError
from doge.common.lease import Claim
from doge.common.storage import Storage, StorageError


def sent(root: str) -> Storage:
    """A storage as a driver that has the packages sends it."""
    storage = object.__new__(Storage)
    storage.__dict__.update(root=root, _opened=root, is_local=False, _arguments=(None, None, None, None))
    return storage


@pytest.mark.parametrize(
    ("root", "module", "package"),
    [("s3://bucket/doge", "s3fs", "s3fs"), ("gs://bucket/doge", "gcsfs", "gcsfs"), ("az://box/doge", "adlfs", "adlfs")],
)
def test_it_is_one_sentence_and_nothing_else_fails_first(root, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    storage = sent(root)
    job = Job("run", "no.such.module:Workload", object(), storage, Claim(storage, "me"), None, use_gpu=False)
    arrived = pickle.dumps(job)
    sentence = rf"^The storage {root} cannot be opened \(.*\): pip install {package} on every machine of the cluster\.$"
    with pytest.raises(MachineError, match=sentence) as caught:
        pickle.loads(arrived)
    assert not isinstance(caught.value, StorageError)  # to try again helps nobody
