"""One rank of one membership of a training: join the group, take up the state, and step until the membership ends.

A membership steps in one phase. At a phase's end all members hand over the state and leave, and the next membership
takes it up with the next phase's objective.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.elastic.membership import Membership, Outcome
from cluster.elastic.workload import Stage
from cluster.workloads.pace import Pace
from cluster.workloads.phase import due_tasks
from cluster.workloads.shares import Shares, fit_to_costs
from cluster.workloads.telemetry import Telemetry
from data_pipelines.order.feed import ReadAhead
from doge.common.errors import UserError
from doge.common.hardware import use_cores
from doge.reporting.tracing import StepTrace
from doge.training import process_group
from doge.training.engine import Engine, StepResult
from doge.training.micro_batch import micro_batch_size
from doge.training.micro_batch_cache import MicroBatchCache, micro_batch_circumstances
from doge.training.objective import unit_seed
from doge.training.state.checkpoint import Checkpoint

if TYPE_CHECKING:
    from cluster.workloads.training_workload import TrainingWorkload

CPU_MICRO_BATCH = 8  # units; a CPU's memory is not probed
FAREWELL_SECONDS = 60  # for the last good state to be written before a run that failed ends


class TrainingLoop:
    """One rank of one membership: (workers, shares, engine)."""

    def __init__(self, workload: "TrainingWorkload", membership: Membership, rank: int):
        self.workload, self.membership, self.rank = workload, membership, rank
        self.world_size = len(membership.members)
        self.settings, self.feeds, self.post = workload.settings, workload.feeds, workload.reporter.post
        self._engine: Engine | None = None
        self._abandoned = threading.Event()
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

    def abandon(self) -> None:
        """Stop the current step after its micro-batch; its result is discarded. Thread-safe."""
        self._abandoned.set()
        if (engine := self._engine) is not None:
            engine.abandon()
        if (read_ahead := self._read_ahead) is not None:
            read_ahead.stop()
        process_group.abort()

    def enter(self, held: Checkpoint | None) -> None:
        """Join the group and build the engine around the run's state; ``held`` is None for a fresh start."""
        began, workload, membership, rank = time.monotonic(), self.workload, self.membership, self.rank
        local_rank, local_size = membership.local_rank(rank)
        use_cores(local_size)
        process_group.join(rank, self.world_size, local_rank, membership.address, workload.device)
        joined = time.monotonic()
        workload.enter(Stage.BUILDING, "engine")
        state, self.position = held or (None, workload.first_position())
        self.phase = self.settings.phases[self.position.phase]
        self.first_step, self.end_step = self.settings.bounds(self.position.phase)
        self.objective = self.phase.objective
        engine = Engine(self.objective, self.phase.optimizer, self.settings.engine, workload.device, state)
        self._engine = engine
        if self._abandoned.is_set():
            raise RuntimeError("The membership was abandoned.")
        self._cache = MicroBatchCache(workload.job.storage / "micro_batches")
        self.pace = self._first_pace()
        self.telemetry = Telemetry(workload.reporter, self.settings, self.phase, engine, membership.number)
        self.seconds = {"process group": joined - began, "engine and state": time.monotonic() - joined}

    def close(self, broken: bool) -> None:
        """Let go of the engine and the group, so that others can be entered; a second call does nothing."""
        if broken:
            process_group.abort()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        process_group.leave()

    def run(self) -> Outcome:
        """Step until the phase's last step is made and handed over, or until a member wants to leave."""
        settings, workload, phase, engine = self.settings, self.workload, self.phase, self.engine
        plan = self.pace.shares
        self._read(plan)
        own_seconds, made_by, work = 0.0, plan, [0.0] * self.world_size  # of the step before
        trace = self._trace()
        try:
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
                news = [float(workload.leave.is_set()), own_seconds, float(workload.limit)]
                result = engine.step(batch, shares.micro_batches[self.rank], factor, news)
                self._check_finite(result, step)
                self.position = replace(
                    self.position,
                    next_unit=first_unit + phase.units_per_step,
                    tokens_seen=self.position.tokens_seen + phase.units_per_step * phase.unit_tokens,
                )
                ended = time.monotonic()
                own_seconds = result.compute_seconds if len(own) else 0.0
                workload.step_seconds = ended - began
                if result.micro_batch_limit is not None:
                    self.note_limit(result.micro_batch_limit)
                self.telemetry.samples(step, own, units)
                if self.rank == 0:
                    self.telemetry.step(result, factor, ended - began, waited, self.position.tokens_seen)
                spent = {"data": waited, "others": result.wait_seconds}
                spent["step"] = ended - began - waited - result.wait_seconds
                if not self.seconds.get("first step"):
                    self.seconds["first step"] = ended - began
                    self.telemetry.started(self.pace.shares.counts[self.rank], workload.limit, self.seconds)
                workload.checkpoints.check()
                trace.step()
                last, step_count = step + 1 == self.end_step, step + 1
                leaving = any(numbers[0] for numbers in result.gathered)
                self.telemetry.time_spent(spent, ended, len(own))
                spent = {}
                for task in due_tasks(phase.side_tasks, step_count, last):
                    spent[task.kind] = self._timed(task.kind, partial(task.run, self))
                if last or leaving or step_count % settings.save_steps == 0:
                    spent["checkpoint"] = self._timed("commit", partial(self.commit, last))
                if spent:
                    self.telemetry.time_spent(spent)
                if (leaving or last) and step_count < settings.max_steps:
                    return Outcome("left", step_count, seconds=self.seconds)
                changed = self._follow(result.gathered, made_by, work)
                made_by, work = plan, next_work
                if changed:
                    plan = self.pace.shares
                    self._read(plan)
            self._timed("commit", workload.checkpoints.wait)
        finally:
            # A collective that broke is no step without progress.
            workload.enter(Stage.CLOSING, "closing", engine.step_count)
            self._reading.close()
            trace.close()
            workload.traced = workload.traced or trace.written
        return Outcome("finished", engine.step_count, seconds=self.seconds)

    def seeds(self, units: range) -> Iterator[int]:
        """Seeds of the phase's units, the same whoever takes them."""
        return (unit_seed(self.settings.seed, self.position.phase, unit) for unit in units)

    def commit(self, phase_ends: bool = False) -> None:
        """Hand a copy of the state to the checkpoint writer; all ranks gather it."""
        state = self.engine.state()
        if state is not None:
            position, after = replace(self.position, recipe=self.settings.recipe), self.position.phase + 1
            if phase_ends and after < len(self.settings.phases):
                feed = self.settings.phases[after].feed.fingerprint
                position = replace(position, phase=after, next_unit=0, feed=feed)
            self.workload.held = (state, position)
            self.workload.checkpoints.save(state, position, self.workload.settle)

    def note_limit(self, limit: int) -> None:
        """Take fewer units at once, from the next step or membership on."""
        self.workload.limit = limit
        self._cache.put(micro_batch_circumstances(self.engine, self.phase.unit_tokens), limit, is_limit=True)
        self.workload.say(
            f"Worker {self.rank} ran out of memory: from now on it takes at most {limit} sequences at once."
        )

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
            limit = micro_batch_size(engine, phase.unit_tokens, phase.units_per_step, CPU_MICRO_BATCH, self._cache)
        workload.limit = min(limit, workload.limit or limit)
        known = engine.all_gather_floats([workload.speed, float(workload.limit)])
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
        for rank, (_, _, limit) in enumerate(gathered):
            if limit and int(limit) != self.pace.limits[rank]:
                self.pace.set_limit(rank, int(limit))
                changed = True
        seconds = [seconds for _, seconds, _ in gathered]
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

    def _check_finite(self, result: StepResult, step: int) -> None:
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return
        with suppress(Exception):  # rank 0's last good state may still be on its way to the storage
            self._timed("commit", lambda: self.workload.checkpoints.wait(FAREWELL_SECONDS))
        self.engine.all_gather_floats([0.0])  # so that every rank names the same checkpoint
        first, steps = self.position.next_unit, self.workload.checkpoints.steps()
        last = f"the last checkpoint is of step {steps[-1]:,}" if steps else "there is no checkpoint yet"
        raise UserError(
            f"In step {step + 1:,} (sequences {first:,} to {first + self.phase.units_per_step - 1:,}) the loss was "
            f"{result.loss} and the gradient norm {result.grad_norm}; {last}: start from one with a lower "
            "--optimizer.lr under another --name."
        )
