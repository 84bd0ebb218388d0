"""Runs without workers: events that are posted to a real board and recorded by a real driver."""

import asyncio
import io
import threading
import time
from contextlib import contextmanager

from cluster.accounts.ledger import LedgerRecipe, StepRecord
from cluster.elastic.events import HostJoined, MembershipFormed
from cluster.machines.scaling import ScalingRecipe
from cluster.runs.board import Board
from cluster.runs.collector import Collector
from cluster.runs.console import Console
from cluster.runs.run import Run, RunConfig
from cluster.workloads.training_events import Evaluated, SamplesTaken, StepMade
from doge.common.storage import Storage
from doge.reporting.tracking import Tracker, TrackingRecipe

COMMIT_STEPS = 10


class LocalBoard:
    """A board in a thread of this process, with the calls of a driver and of hosts."""

    def __init__(self):
        self._board, self._loop = Board(), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            answer = asyncio.run_coroutine_threadsafe(getattr(self._board, name)(*args, **kwargs), self._loop)
            return answer.result(30)

        return call


def recorded_run(root, output=None, uri: str | None = None) -> Run:
    config = RunConfig(
        name="small",
        storage=Storage(str(root)),
        scaling=ScalingRecipe(),
        tracking=TrackingRecipe(uri=uri),
        ledger=LedgerRecipe(),
        parameters={"optimizer.lr": 0.1},
        tokens_per_step=8,
        tokens_per_unit=1,
    )
    return Run(config, Console(1000, 10, output or io.StringIO()))


@contextmanager
def driving(run: Run):
    """Claim and record a run; yields its board."""
    board = LocalBoard()
    with run.claim(), run.record(), Collector(board, run.journal, run.console.say):
        yield board


def make_steps(board: LocalBoard, steps: range, seconds: float = 0.0) -> float:
    """Post what a host tells of these steps; returns the longest time that a commit had to wait."""
    board.post(HostJoined("a", "n1", time.monotonic()))
    board.post(MembershipFormed(1, time.monotonic(), 1, steps.start - 1, steps.start - 1, 0.0, None))
    longest = 0.0
    for step in steps:
        time.sleep(seconds)
        metrics = {"loss": 1 / step, "tokens_per_s": 8.0, "learning_rate": 0.1}
        board.post(StepMade(step, metrics))
        board.post(SamplesTaken(step - 1, 8 * (step - 1), [("code", 0, step)]))
        board.post(StepRecord("a", "n1", "CPU", 1, step, time.monotonic(), {"step": 1e-6}, 8))
        if step % COMMIT_STEPS == 0:
            board.post(Evaluated(step, {"held_out_loss": 2.0}, 4.0))
            began = time.monotonic()
            assert board.settle() is None
            longest = max(longest, time.monotonic() - began)
    return longest


def tracked(root, uri: str | None = None, metric: str = "loss") -> list[tuple[int, float]]:
    """What MLflow holds of the run, in the order of steps."""
    storage = Storage(str(root))
    return Tracker(TrackingRecipe(uri=uri), storage, storage / "runs/small", "small").history(metric)
