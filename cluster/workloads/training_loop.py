"""One rank of one membership of a training: join the group, take up the state, and step until the membership ends.

A membership steps in one phase. At a phase's end all members hand over the state and leave, and the next membership
takes it up with the next phase's objective.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cluster.elastic.membership import Membership, Outcome
from cluster.elastic.workload import Stage
from cluster.workloads.careful_step import careful_step
from cluster.workloads.held_state import Held, Replica
from cluster.workloads.pace import Pace
from cluster.workloads.phase import due_tasks
from cluster.workloads.shares import Shares, fit_to_costs
from cluster.workloads.telemetry import Telemetry
from data_pipelines.order.feed import FeedConfig, ReadAhead
from doge.common.hardware import use_cores
from doge.reporting.tracing import StepTrace
from doge.training import process_group
from doge.training.communicator import CommunicationError, Communicator
from doge.training.engine import Engine
from doge.training.memory import NothingFits
from doge.training.micro_batch import micro_batch_size
from doge.training.micro_batch_cache import MicroBatchCache
from doge.training.objective import unit_seed
from doge.training.state.run_position import RunPosition
from doge.training.step_result import StepResult

if TYPE_CHECKING:
    from cluster.workloads.training_workload import TrainingWorkload

CPU_MICRO_BATCH = 8  # units; a CPU's memory is not probed


class TrainingLoop:
    """One rank of one membership: (workers, shares, engine)."""

    def __init__(self, workload: "TrainingWorkload", membership: Membership, rank: int):
        self.workload, self.membership, self.rank = workload, membership, rank
        self.world_size = len(membership.members)
        self.settings, self.feeds, self.post = workload.settings, workload.feeds, workload.reporter.post
        self._engine: Engine | None = None
        self._group: Communicator | None = None
        self._abandoned = threading.Event()
        self._partitions = False  # DeepSpeed's group is that of the membership, and not this process's own
        self._committed = time.monotonic()  # when the last checkpoint was handed over, or this began
        self._read_ahead: ReadAhead[Any] | None = None

    @property
    def engine(self) -> Engine:
        """The engine, from `enter` to `close`."""
        if self._engine is None:
            raise RuntimeError("The membership has no engine now.")
        return self._engine

    @property
    def waiting(self) -> bool:
        """Whether what is under way waits for other ranks. Thread-safe."""
        engine = self._engine
        return self.workload.stage is Stage.JOINING if engine is None else engine.waiting

    @property
    def abandoned(self) -> bool:
        return self._abandoned.is_set()

    @property
    def progress(self) -> int:
        """Grows with every micro-batch and every piece that is exchanged. Thread-safe."""
        engine = self._engine
        return 0 if engine is None else engine.progress

    def abandon(self) -> None:
        """Stop the current step after its micro-batch; its result is discarded. Thread-safe."""
        self._abandoned.set()
        if (engine := self._engine) is not None:
            engine.abandon()
        if (group := self._group) is not None:
            group.abort()
        if (read_ahead := self._read_ahead) is not None:
            read_ahead.stop()
        if self._partitions:
            process_group.abort()

    def enter(self) -> None:
        """Join the group, and bring an engine to the state that the membership starts from."""
        began, workload = time.monotonic(), self.workload
        use_cores(self.membership.sharing_cores(self.rank))
        group = self._group = Communicator(
            self.rank, self.world_size, self.membership.address, workload.ip, workload.device, self._abandoned.is_set
        )
        # One worker that has to partition is enough; what is owed, rank 0 says.
        said = group.all_gather([float(workload.partitions), float(self.rank == 0 and workload.owes)])
        partitions, self._owes = (any(numbers) for numbers in zip(*said, strict=True))
        joined = time.monotonic()
        workload.enter(Stage.BUILDING, "engine")
        try:
            engine = self._engine = self._partitioned(group) if partitions else self._replica(group)
            if self._abandoned.is_set():
                raise CommunicationError("The membership was abandoned.")
            self.pace = self._first_pace()
        except (NothingFits, torch.OutOfMemoryError) as error:
            if partitions or self.settings.engine.states != "auto" or self.world_size == 1:
                raise
            workload.partitions = True
            workload.say(f"Worker {self.rank} cannot hold the whole training state: all workers hold a part of it now.")
            raise CommunicationError("The state has to be partitioned.") from error
        self.telemetry = Telemetry(workload.reporter, self.settings, self.phase, engine, self.membership.number)
        self.seconds = {"process group": joined - began, "engine and state": time.monotonic() - joined}
        workload.enter_seconds = sum(self.seconds.values())

    def _begin_at(self, position: RunPosition, step: int) -> None:
        """Take up the phase of the update after ``step``, or the one before where something is owed there."""
        if step == self.settings.bounds(position.phase)[1] and not self._owes:
            position = self.settings.next_phase(position)
        self.position = position
        self.phase = self.settings.phases[position.phase]
        self.first_step, self.end_step = self.settings.bounds(position.phase)
        self.objective = self.phase.objective

    def _partitioned(self, group: Communicator) -> Engine:
        """An engine of this membership alone, whose state is partitioned over its members."""
        workload = self.workload
        self._partitions = True
        workload.release_replica()
        state, position = workload.kept.checkpoint() if workload.kept else (None, workload.first_position())
        self._begin_at(position, state.step if state else 0)
        process_group.leave()
        store = dist.HashStore() if group.store is None else dist.PrefixStore("deepspeed", group.store)
        process_group.join(self.rank, self.world_size, store, workload.device)
        return Engine(self.objective, self.phase.optimizer, self.settings.engine, workload.device, state)

    def _replica(self, group: Communicator) -> Engine:
        """An engine with the whole state: the one that this host has, if it fits."""
        workload = self.workload
        held = workload.held
        self._begin_at(*(held.position, held.id.step) if held else (workload.first_position(), 0))
        if workload.replica is not None and workload.replica.phase != self.position.phase:
            workload.release_replica()
        held, replica = workload.kept, workload.replica
        if replica is None:
            process_group.be_alone(workload.device)
            state = held.checkpoint()[0] if held else None
            engine = Engine(self.objective, self.phase.optimizer, self.settings.engine, workload.device, state, group)
        else:
            engine = replica.engine
            engine.join(group)
            if held is not None:
                engine.load(held.checkpoint()[0])
        last = replica.last if replica is not None and held is None else None
        settled = engine.step_count - self._owes
        number, phase = self.membership.number, self.position.phase
        workload.replica = Replica(engine, self.position, number, phase, settled, last)
        workload.kept = None
        if self.rank == 0 and last is not None:  # whoever should have told of it may be gone
            self.post(last)
        return engine

    def close(self, broken: bool) -> None:
        """Let go of the engine and the group, so that others can be entered; a second call does nothing."""
        engine, self._engine = self._engine, None
        group, self._group = self._group, None
        if broken and group is not None:
            group.abort()
        if self._partitions:
            self._partitions = False
            if broken:
                process_group.abort()
            if engine is not None:
                engine.close()
            process_group.leave()
        elif engine is not None and engine.whole:
            engine.leave()
        elif engine is not None:  # an update broke off half made
            self.workload.drop_replica()
        if group is not None:
            group.close()

    def run(self) -> Outcome:
        """Step until the phase's last step is made and handed over, or until a member wants to leave."""
        workload, phase, engine = self.workload, self.phase, self.engine
        plan = self.pace.shares
        self._read(plan)
        own_seconds, made_by, work = 0.0, plan, [0.0] * self.world_size  # of the step before
        trace = self._trace()
        try:
            if self._owes and (outcome := self._conclude(engine.step_count)) is not None:
                return outcome
            for step in range(engine.step_count, self.end_step):
                began = time.monotonic()
                workload.enter(Stage.BETWEEN, "data", step)
                units = next(self._reading)
                waited = time.monotonic() - began
                workload.enter(Stage.STEPPING, "step", step)
                first_unit = self.position.next_unit
                shares, next_work = self._step_shares(plan, first_unit)
                own = shares.ranges(first_unit)[self.rank]
                factor = phase.lr_scheduler.factor(step - self.first_step, phase.steps)
                batch = self.objective.prepare(engine.module, units, self.seeds(own))
                news = [float(workload.leave.is_set()), own_seconds, float(workload.limit.now), float(self._overdue())]
                self.telemetry.samples(step, own, units)
                make = partial(engine.step, batch, shares.micro_batches[self.rank], factor, news)
                result = careful_step(self, step, make)
                self._advance()
                ended = time.monotonic()
                workload.step_seconds = ended - began
                leaving, overdue, own_seconds = False, False, 0.0
                if result is not None:
                    own_seconds = result.compute_seconds if len(own) else 0.0
                    if result.micro_batch_limit is not None:
                        self.note_limit(result.micro_batch_limit)
                    self._tell(result, factor, ended - began, waited, len(own))
                    leaving = any(numbers[0] for numbers in result.gathered)
                    overdue = any(numbers[3] for numbers in result.gathered)
                workload.checkpoints.check()
                trace.step()
                if (outcome := self._conclude(step + 1, leaving, overdue)) is not None:
                    return outcome
                changed = result is not None and self._follow(result.gathered, made_by, work)
                made_by, work = plan, next_work
                if changed:
                    plan = self.pace.shares
                    self._read(plan)
            if workload.replica is not None and self.rank == 0 and not workload.checkpoints.has(engine.step_count):
                self._timed("commit", self.commit)  # who should have written the last state may be gone
            self._timed("commit", workload.checkpoints.wait)
        finally:
            # A collective that broke is no step without progress.
            workload.enter(Stage.CLOSING, "closing", engine.step_count)
            self._reading.close()
            trace.close()
            workload.traced = workload.traced or trace.written
        return Outcome("finished", engine.step_count, seconds=self.seconds)

    def _overdue(self) -> bool:
        """Whether rank 0's last checkpoint is too long ago."""
        bound = self.settings.save_seconds
        return self.rank == 0 and bound is not None and time.monotonic() - self._committed > bound

    def _conclude(self, step_count: int, leaving: bool = False, overdue: bool = False) -> Outcome | None:
        """Do what is due after ``step_count`` updates; returns the outcome where the membership ends there."""
        settings, workload, last = self.settings, self.workload, step_count == self.end_step
        spent = {}
        for task in due_tasks(self.phase.side_tasks, step_count, last):
            spent[task.kind] = self._timed(task.kind, partial(task.run, self))
        if last or leaving or overdue or step_count % settings.save_steps == 0:
            spent["checkpoint"] = self._timed("commit", self.commit)
        if workload.replica is not None:
            workload.replica.settled = step_count
        if spent:
            self.telemetry.time_spent(spent)
        if (leaving or last) and step_count < settings.max_steps:
            return Outcome("left", step_count, seconds=self.seconds)
        return None

    def _tell(self, result: StepResult, lr_factor: float, seconds: float, waited: float, units: int) -> None:
        """Tell of a step that was just made."""
        made = self.telemetry.step(result, lr_factor, seconds, waited, self.position.tokens_seen)
        if self.workload.replica is not None:
            self.workload.replica.last = made
        if not self.seconds.get("first step"):
            self.seconds["first step"] = seconds
            self.telemetry.started(self.pace.shares.counts[self.rank], self.workload.limit.now, self.seconds)
        spent = {"data": waited, "others": result.wait_seconds, "step": seconds - waited - result.wait_seconds}
        self.telemetry.time_spent(spent, units=units)

    def _advance(self) -> None:
        """Note that a step's units are done with."""
        phase, position = self.phase, self.position
        self.position = replace(
            position,
            next_unit=position.next_unit + phase.units_per_step,
            tokens_seen=position.tokens_seen + phase.units_per_step * phase.unit_tokens,
        )
        if self.workload.replica is not None:
            self.workload.replica.position = self.position

    def read(self, feed: FeedConfig, units: range) -> Any:
        """Units of a feed; a wait for them ends with the membership."""
        found = self.feeds.open(feed).read(units.start, units.stop, self._abandoned)
        if self._abandoned.is_set():
            raise CommunicationError("The membership was abandoned.")
        return found

    def seeds(self, units: range) -> Iterator[int]:
        """Seeds of the phase's units, the same whoever takes them."""
        return (unit_seed(self.settings.seed, self.position.phase, unit) for unit in units)

    def commit(self) -> None:
        """Hand a copy of the state to the checkpoint writer; where it is partitioned, all ranks gather it."""
        workload, replicated = self.workload, self.engine.replicas is not None
        if replicated and self.rank > 0:
            return
        state = self.engine.state()
        if state is None:
            return
        self._committed = time.monotonic()
        position = workload.save(state, self.position, self.membership.number)
        if not replicated:
            workload.kept = Held.of((state, position), self.membership.number)

    def note_limit(self, limit: int) -> None:
        """Take fewer units at once, from the next step or membership on, for a while."""
        self.workload.limit.lower(limit)
        self.workload.say(f"Worker {self.rank} ran out of memory: for now it takes at most {limit} sequences at once.")

    @property
    def _reading(self) -> ReadAhead[Any]:
        if self._read_ahead is None:
            raise RuntimeError("No units are read ahead yet.")
        return self._read_ahead

    def _first_pace(self) -> Pace:
        """The shares to begin with, from what every member knows of itself."""
        workload, phase, engine = self.workload, self.phase, self.engine
        limit = self.settings.micro_batch_size
        if limit is None:
            cache = MicroBatchCache(workload.job.storage / "micro_batches")
            limit = micro_batch_size(engine, phase.unit_tokens, phase.units_per_step, CPU_MICRO_BATCH, cache)
        workload.limit.find(limit, self.position.phase)
        known = engine.all_gather_floats([workload.speed, float(workload.limit.now)])
        speeds = [speed or None for speed, _ in known]
        if self.settings.shares == "equal":
            speeds = [None] * self.world_size
        limits = [int(limit) for _, limit in known]
        return Pace(phase.units_per_step, limits, engine.equal_micro_batches, speeds)

    def _step_shares(self, plan: Shares, first_unit: int) -> tuple[Shares, list[float]]:
        """The shares of the step that begins with ``first_unit``, and the cost of every worker's part."""
        feed = self.feeds.open(self.phase.feed)
        costs = [feed.cost(unit) for unit in range(first_unit, first_unit + self.phase.units_per_step)]
        return fit_to_costs(plan, costs, self.pace.limits)

    def _follow(self, gathered: list[list[float]], made_by: Shares, work: list[float]) -> bool:
        """Take in what all members said of the step before; True if the next step is shared out otherwise.

        Args:
            gathered: by rank: whether it leaves, the seconds that it computed, its micro-batch limit.
            made_by: the plan of the step before.
            work: the cost of every worker's part of it.
        """
        changed = False
        for rank, (_, _, limit, _) in enumerate(gathered):
            if limit and int(limit) != self.pace.limits[rank]:
                self.pace.set_limit(rank, int(limit))
                changed = True
        seconds = [seconds for _, seconds, _, _ in gathered]
        if any(seconds) and self.settings.shares == "measured":
            changed |= self.pace.observe(seconds, made_by.counts, work)
            self.workload.speed = self.pace.speeds[self.rank]
        return changed

    def _read(self, plan: Shares) -> None:
        """Read ahead this rank's share of every step to come."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        start, per_step = self.position.next_unit, self.phase.units_per_step
        firsts = range(start, start + (self.end_step - self.engine.step_count) * per_step, per_step)
        own = (self._step_shares(plan, first)[0].ranges(first)[self.rank] for first in firsts)
        feed = self.feeds.open(self.phase.feed)
        self._read_ahead = feed.prefetch((share.start, share.stop) for share in own)
        if self._abandoned.is_set():
            self._read_ahead.stop()

    def _timed(self, activity: str, act: Callable[[], object]) -> float:
        began = time.monotonic()
        self.workload.enter(Stage.BETWEEN, activity, self.engine.step_count)
        act()
        return time.monotonic() - began

    def _trace(self) -> StepTrace:
        """A trace of the first worker's steps, until one was written."""
        workload = self.workload
        steps = self.settings.profile_steps if self.rank == 0 and not workload.traced else 0
        folder = workload.job.storage / f"runs/{workload.job.name}/traces"
        return StepTrace(self.engine.step_count, steps, folder, workload.say)
