"""Training as a host's workload: what is kept from one membership to the next, and how it goes through one."""

import gc
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ray
import torch

from cluster.elastic.events import Message
from cluster.elastic.membership import Membership, Outcome, StateId, node_name
from cluster.elastic.workload import Beat, Job, Stage
from cluster.workloads.held_state import Held, Replica, SharedTrainState
from cluster.workloads.memory_limit import MemoryLimit
from cluster.workloads.outbox import Outbox
from cluster.workloads.phase import TrainingSettings
from cluster.workloads.telemetry import Reporter
from cluster.workloads.training_loop import TrainingLoop
from data_pipelines.order.feed import Feed, FeedConfig
from doge.common.errors import MachineError, UserError
from doge.common.hardware import device_trouble
from doge.common.storage import Storage, StorageError
from doge.training.communicator import is_symptom
from doge.training.memory import OutOfMemory
from doge.training.state.checkpoint import Checkpoints, Superseded, load_checkpoint
from doge.training.state.run_position import RunningMean, RunPosition
from doge.training.state.train_state import TrainState
from doge.training.warm_up import warm_up


class OpenFeeds:
    """The feeds of a training, each opened once in this process."""

    def __init__(self, storage: Storage, on_wait: Callable[[str], None], on_trouble: Callable[[str], None]):
        self._storage, self._on_wait, self._on_trouble = storage, on_wait, on_trouble
        self._open: dict[FeedConfig, Feed[Any]] = {}

    def open(self, config: FeedConfig) -> Feed[Any]:
        if config not in self._open:
            self._open[config] = config.open(self._storage, self._on_wait, self._on_trouble)
        return self._open[config]


class TrainingWorkload:
    """What a host that trains keeps from one membership to the next: the data, the newest state, its own speed.

    Args:
        job: whose settings are `TrainingSettings`.
        host: name of the host.
        leave: is set when the membership shall end at the next step that all members can agree on.
    """

    def __init__(self, job: Job, host: str, leave: threading.Event):
        self.job, self.leave = job, leave
        self.settings: TrainingSettings = job.settings
        node = node_name(socket.gethostname(), ray.get_runtime_context().get_node_id())
        self.ip = ray.util.get_node_ip_address()
        self.reporter = Reporter(
            host, node, _clock_offset(job.board), Outbox(lambda events: job.board.post.remote(*events))
        )
        self.feeds = OpenFeeds(job.storage, self._wait_message, self.say)
        for phase in self.settings.phases:
            self.feeds.open(phase.feed)
        self.checkpoints = Checkpoints(
            job.storage / f"runs/{job.name}/checkpoints", self.settings.save_total_limit, self.say
        )
        self.device = torch.device("cuda", 0) if job.use_gpu else torch.device("cpu")
        self.partitions = self.settings.engine.states == "partitioned"
        self.kept: Held | None = None  # the newest state, where it lies in memory and in no engine that may step on
        self.replica: Replica | None = None  # else the engine that has the whole state
        self.speed = 0.0  # units per second; 0 is unknown
        self.limit = MemoryLimit()
        self.step_seconds = self.enter_seconds = 0.0  # that the last ones took
        self.traced = False  # there is a trace of steps
        self._doing = (Stage.IDLE, "idle", 0)
        self._membership = 0
        self._aborted = 0  # the latest membership that it was told to abort
        self._moves = 0  # of its own, beside those of its engine
        self._loop: TrainingLoop | None = None

    def warm_up(self) -> None:
        warm_up(self.settings.phases[0].optimizer, self.settings.engine, self.device)
        gc.freeze()  # the modules stay: to look through them takes most of a collection, and there is one a membership

    def run(self, membership: Membership, rank: int, state: Any) -> Outcome:
        self._membership, start = membership.number, membership.start
        self.enter(Stage.JOINING, "joining", start.step if start else 0)
        if isinstance(state, SharedTrainState):
            self.kept = state.open()
        elif start is None:
            self.kept = None
            self.drop_replica()
        elif start != self._held_id():
            self.enter(Stage.IDLE, "idle", start.step)
            return Outcome("broken", start.step, f"worker {rank} holds another state than it had told")
        loop = self._loop = TrainingLoop(self, membership, rank)
        if self._aborted == membership.number:  # it was told before this began
            loop.abandon()
        try:
            loop.enter()
            outcome = loop.run()
            loop.close(broken=False)
            return outcome
        except MachineError as error:
            return Outcome("unable", self.step, str(error))
        except UserError as error:  # another membership would only meet it again
            ray.get(self.job.board.stop.remote(str(error)))
            return Outcome("stopped", self.step, str(error))
        except OutOfMemory as error:
            loop.note_limit(error.limit)
            reason = f"worker {rank} ran out of memory, from now on it takes at most {error.limit} sequences at once"
            return Outcome("full", self.step, reason)
        except Exception as error:
            kind: Literal["broken", "failed"] = "broken" if loop.abandoned or is_symptom(error) else "failed"
            reason = " ".join(str(error).split())[:160]
            loop.close(broken=True)
            if kind == "broken" and (trouble := device_trouble(self.device)):
                return Outcome("failed", self.step, f"worker {rank}: its GPU is not usable any more: {trouble}")
            return Outcome(kind, self.step, f"worker {rank}: {type(error).__name__}: {reason}")
        finally:
            loop.close(broken=True)
            self._loop = None
            self.reporter.outbox.flush()
            gc.collect()
            if self.job.use_gpu:
                torch.cuda.empty_cache()
            self.enter(Stage.IDLE, "idle", self.step)

    def newest_state(self) -> Held | None:
        # Without storage this copy may be stale: others may have gone on without this host.
        steps, own = self.checkpoints.steps(), self._held_id()
        if steps and (own is None or steps[-1] > own.step):
            loaded = self.checkpoints.latest()
            if loaded is not None and (own is None or loaded[0].step > own.step):
                self.kept = Held.of(loaded)
        held = self.held or self._foreign_start()
        if held is None:
            return None
        position = held.position
        if position.phase >= len(self.settings.phases) or position.feed != self._feed(position.phase):
            raise UserError(
                f"The data of the run {self.job.name} is not what it was when it started (recipe, files or tokenizer): "
                "choose another --name, and --from one of its checkpoints to train on with other data."
            )
        return held

    def release_replica(self) -> None:
        """Take the state out of the engine that has it whole, into memory."""
        held = self.held
        if held is not None and self.kept is None:
            self.kept = Held.of(held.checkpoint(), held.id.membership)
        self.drop_replica()

    def drop_replica(self) -> None:
        replica, self.replica = self.replica, None
        if replica is not None:
            replica.engine.close()

    def beat(self) -> Beat:
        (stage, activity, step), loop = self._doing, self._loop
        return Beat(
            stage=stage,
            activity=activity,
            waiting=stage is Stage.JOINING if loop is None else loop.waiting,
            membership=self._membership,
            step=step,
            step_seconds=self.step_seconds,
            progress=self._moves + self.checkpoints.attempts + (loop.progress if loop is not None else 0),
            held=self._held_id(),
            enter_seconds=self.enter_seconds,
        )

    def abort(self, number: int) -> None:
        self._aborted = number
        loop = self._loop
        if loop is not None and loop.membership.number == number:
            loop.abandon()

    def commit(self) -> None:
        held = self.held
        if held is None or held.id.membership == 0 or held.id.step == 0 or self.checkpoints.has(held.id.step):
            return
        with suppress(StorageError):  # the writing waits for the storage
            if held.id.step in self.checkpoints.steps():
                return
        self.enter(Stage.IDLE, "commit", held.id.step)
        with suppress(Exception):  # what ended an earlier attempt: this is another one
            self.checkpoints.check()
        self.save(*held.checkpoint(), held.id.membership)

    def save(self, state: TrainState, position: RunPosition, membership: int) -> RunPosition:
        """Let a state be written that will not change; returns where the checkpoint stands."""
        position = self.settings.position_to_commit(position, state.step)
        self.checkpoints.save(state, position, partial(self.settle, membership), partial(self.check_epoch, membership))
        return position

    def flush(self) -> None:
        self.checkpoints.wait()

    @property
    def stage(self) -> Stage:
        return self._doing[0]

    @property
    def step(self) -> int:
        """Steps made, as last noted."""
        return self._doing[2]

    def enter(self, stage: Stage, activity: str, step: int = 0) -> None:
        """Note what this host does from now on."""
        self._doing = (stage, activity, step)
        self._moves += 1

    def say(self, message: str) -> None:
        self.reporter.post(Message(message))

    def first_position(self) -> RunPosition:
        """Where a run begins that has no state."""
        return RunPosition(self._feed(0), self.settings.tokenizer)

    def check_epoch(self, membership: int) -> None:
        """Raise Superseded where a later membership publishes checkpoints now."""
        if not ray.get(self.job.board.may_publish.remote(membership)):
            raise Superseded

    def settle(self, membership: int) -> None:
        """Return once the driver has recorded everything that was posted: a checkpoint never gets ahead of its record.

        Raises UserError when nothing may be committed any more, and Superseded where this membership may not.
        """
        self.reporter.outbox.flush()
        if reason := ray.get(self.job.board.settle.remote()):
            raise UserError(reason)
        self.job.claim.check()
        self.check_epoch(membership)

    def _feed(self, phase: int) -> str:
        return self.settings.phases[phase].feed.fingerprint

    @property
    def held(self) -> Held | None:
        """The newest state that this host holds."""
        kept, replica = self.kept, self.replica
        if kept is None and replica is not None and replica.engine.whole:
            return Held(replica.id, replica.position, replica.checkpoint)
        return kept

    @property
    def owes(self) -> bool:
        """Whether something due after the last step, such as an evaluation, was not done before the group broke."""
        return self.kept is None and self.replica is not None and self.replica.settled < self.replica.engine.step_count

    def _held_id(self) -> StateId | None:
        held = self.held
        return held.id if held is not None else None

    def _foreign_start(self) -> Held | None:
        """The state of another run to begin with."""
        if self.settings.start_from is None:
            return None
        state, position = load_checkpoint(self.settings.start_from)
        phase = self.settings.phase_at(state.step)
        if (position.phase, position.feed) != (phase, self._feed(phase)):  # other data is read from its own beginning
            position = replace(position, phase=phase, feed=self._feed(phase), next_unit=0, loss=RunningMean())
        self.kept = Held.of((state, position))
        return self.kept

    def _wait_message(self, message: str) -> None:
        if reason := ray.get(self.job.board.stopped.remote()):
            raise UserError(reason)
        self._moves += 1
        if message and self._loop is not None and self._loop.rank == 0:
            self.say(message)


def _clock_offset(board: Any) -> float:
    """Seconds from this machine's monotonic clock to the driver's."""
    asked = time.monotonic()
    now: float = ray.get(board.now.remote())
    return now - (asked + time.monotonic()) / 2
