"""The actor that hosts post to may be ended, as by Ray's memory monitor: a sentence ends the run, and no traceback."""

import threading
import time

import pytest
from recorded_runs import recorded_run

from cluster.runs import board as board_module
from cluster.runs.board import BoardActor, BoardLost, why_ray_ended
from cluster.runs.collector import Collector

KILLED = (
    "The actor died unexpectedly.\n1 worker(s) were killed due to the node running low on memory. Refer to the docs."
)


class Handle:
    """An actor's handle whose calls give one outcome after another: an error, or an answer."""

    def __init__(self, *outcomes):
        self.outcomes, self.asked = list(outcomes), []

    def __getattr__(self, name):
        def remote(*arguments):
            self.asked.append((name, *arguments))
            return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def board_of(monkeypatch):
    import ray

    def get(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def make(*outcomes):
        board = BoardActor.__new__(BoardActor)
        board.handle = Handle(*outcomes)
        return board

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(board_module, "BUSY_SECONDS", 0.0)
    return make


def died(text):
    import ray

    error = ray.exceptions.ActorDiedError()
    error.error_msg = text
    return error


def test_a_busy_board_is_asked_again(board_of):
    import ray

    board = board_of(ray.exceptions.ActorUnavailableError("busy", None), ["event"])
    assert board.take(3) == ["event"]
    assert board.handle.asked == [("take", 3), ("take", 3)]


def test_a_board_that_has_ended_says_why_and_what_to_do(board_of):
    with pytest.raises(
        BoardLost, match=r"^This machine's memory is full, and Ray ended the process .*: free some of it"
    ):
        board_of(died(KILLED)).take(0)
    with pytest.raises(BoardLost, match=r"^Ray lost the process .* \(its worker was killed\): run the same command to"):
        board_of(died("The actor died.\nits worker was killed.")).stopped()
    board_of(died(KILLED)).stop("too late")
    assert why_ray_ended("it", ValueError()) == "Ray lost it (ValueError): run the same command to resume"


def test_the_collector_ends_with_its_board(board_of, tmp_path, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    run = recorded_run(tmp_path)
    collector = Collector(board_of([], died(KILLED)), run._open_journal(), print)
    began = time.monotonic()
    with collector:
        collector._thread.join(10)
    assert time.monotonic() - began < 5
    assert isinstance(collector.lost, BoardLost)
    assert raised == []
