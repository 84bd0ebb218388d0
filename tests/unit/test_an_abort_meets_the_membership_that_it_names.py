"""A word to abort may come late, when its host is in another membership already."""

from types import SimpleNamespace

import pytest

from cluster.elastic.membership import Membership
from cluster.workloads.training_loop import TrainingLoop
from cluster.workloads.training_workload import TrainingWorkload
from data_pipelines.order.feed import ReadAhead


class EngineStub:
    abandoned = False

    def abandon(self) -> None:
        self.abandoned = True


def test_an_abort_meets_the_membership_that_it_names_and_no_other():
    engine, workload = EngineStub(), object.__new__(TrainingWorkload)
    workload.settings = workload.feeds = None
    workload.reporter = SimpleNamespace(post=None)
    workload._loop = loop = TrainingLoop(workload, Membership(2, (), ("127.0.0.1", 1)), 0)
    loop._read_ahead = ReadAhead(lambda *_: None, [(0, 1)], 1)
    workload.abort(1)
    assert next(loop._read_ahead) is None
    loop._engine = engine
    workload.abort(2)
    assert engine.abandoned
    with pytest.raises(RuntimeError, match="stopped"):
        next(loop._read_ahead)
    workload._loop = None
    workload.abort(2)
