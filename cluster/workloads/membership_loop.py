"""A membership's steps: join the group, take up the run's state, and step until the membership ends."""

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import ray
import torch

from cluster.accounts.ledger import StepRecord
from cluster.elastic.membership import Given, Membership, Outcome
from cluster.workloads.pace import Pace
from cluster.workloads.shares import Shares, plan_shares
from data_pipelines.order.feed import ReadAhead
from data_pipelines.order.packed_sequences import Sequences
from doge.common.config_tree import to_dict
from doge.common.errors import UserError
from doge.common.hardware import device_name, energy_joules, peak_memory_bytes, peak_tflops, use_cores
from doge.model.configuration import flops_per_token
from doge.model.experts import pop_expert_usage, track_expert_usage
from doge.model.modeling import build_model
from doge.reporting.tracing import StepTrace
from doge.training import process_group
from doge.training.engine import Engine, StepResult
from doge.training.micro_batch import MicroBatchCache, micro_batch_circumstances, micro_batch_size
from doge.training.state.train_state import TrainState

if TYPE_CHECKING:
    from cluster.workloads.worker import Worker

CPU_MICRO_BATCH = 8  # sequences; a CPU's memory is not probed
FAREWELL_SECONDS = 60  # for the last good state to be written before a run that failed ends


@dataclass
class Position:
    """Where a run stands in its data: the whole resume state of the data is ``next_sequence``.

    Args:
        data_plan: fingerprint of the data's plan.
        tokenizer: fingerprint of the tokenizer, without which the weights mean nothing.
        next_sequence: number of the first sequence of the next step.
        tokens_seen: all that was trained on.
    """

    data_plan: str
    tokenizer: str
    next_sequence: int = 0
    tokens_seen: int = 0


class MembershipLoop:
    """One rank of one membership: (workers, shares, engine)."""

    def __init__(self, worker: "Worker", membership: Membership, rank: int):
        self.worker, self.membership, self.rank = worker, membership, rank
        self.world_size = len(membership.members)
        self.recipe, self.board, self.reader = worker.recipe, worker.board, worker.reader
        self.engine: Engine | None = None
        self._abandoned = threading.Event()
        self._read_ahead: ReadAhead[Sequences] | None = None

    def abandon(self) -> None:
        """From another thread: what is under way is in vain, and ends with an error at the next chance."""
        self._abandoned.set()
        if (engine := self.engine) is not None:
            engine.abandon()
        if (read_ahead := self._read_ahead) is not None:
            read_ahead.stop()

    def enter(self, given: Given | None) -> None:
        """Join the group and build the engine around the run's state."""
        began, worker, membership, rank = time.monotonic(), self.worker, self.membership, self.rank
        local_rank, local_size = membership.local_rank(rank)
        use_cores(local_size)
        self.device = worker.device
        process_group.join(rank, self.world_size, local_rank, membership.address, self.device)
        joined = time.monotonic()
        worker.enter("engine")
        if given is not None:
            worker.held = _unpacked(given)
        elif membership.source != worker.host:
            worker.held = None  # a fresh start
        state, memory = worker.held or (None, None)
        self.position = (
            Position(**memory["position"])
            if memory
            else Position(worker.config.data_plan, self.reader.plan.tokenizer_fingerprint)
        )
        self.model_config = self.recipe.model.build()
        torch.manual_seed(self.recipe.training.seed)
        model = build_model(self.model_config)
        if self.recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.engine = Engine(model, self.recipe.optimizer, self.recipe.engine, self.device, state)
        if self._abandoned.is_set():
            raise RuntimeError("The membership was abandoned.")
        self._cache = MicroBatchCache(worker.config.storage / "micro_batches")
        self.pace = self._pace()
        track_expert_usage(self.engine.module)
        self.peak_tflops = self.recipe.tracking.peak_tflops or peak_tflops(self.device)
        self.seconds = {"process group": joined - began, "engine and state": time.monotonic() - joined}
        self._began = began
        self._energy = energy_joules(self.device)

    def close(self, broken: bool) -> None:
        """Let go of the engine and the group, so that others can be entered; a second call does nothing."""
        if broken:
            process_group.abort()
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()
        process_group.leave()

    def run(self) -> Outcome:
        """Step until the recipe's last step is made and committed, or until a member wants to leave."""
        training, worker = self.recipe.training, self.worker
        shares = self.pace.shares
        self._read(shares)
        own_seconds, counts = 0.0, shares.counts  # of the step before
        trace = self._trace()
        try:
            for step in range(self.engine.step_count, training.max_steps):
                began = time.monotonic()
                worker.enter("data", step)
                batch = next(self._read_ahead)
                waited = time.monotonic() - began
                worker.enter("step", step)
                factor = self.recipe.lr_scheduler.factor(step, training.max_steps)
                tell = [float(worker.leave.is_set()), own_seconds, float(worker.limit)]
                result = self.engine.step(_tensors(batch), shares.micro_batches[self.rank], factor, tell)
                self._check_finite(result, step)
                first_sequence = self.position.next_sequence
                self.position.next_sequence += training.global_batch_size
                self.position.tokens_seen += training.global_batch_size * self.recipe.data.sequence_length
                ended = time.monotonic()
                own_seconds = result.compute_seconds if shares.counts[self.rank] else 0.0
                worker.step_seconds = ended - began
                if result.micro_batch_limit is not None:
                    self.note_limit(result.micro_batch_limit)
                self._tell_samples(step, shares.ranges(first_sequence)[self.rank], batch)
                if self.rank == 0:
                    self._tell_step(result, factor, ended - began, waited)
                spent = {"data": waited, "others": result.wait_seconds}
                spent["step"] = ended - began - waited - result.wait_seconds
                if not self.seconds.get("first step"):
                    self._tell_start(ended - began)
                worker.checkpoints.check()
                trace.step()
                done, step_count = step + 1 == training.max_steps, step + 1
                leaving = any(told[0] for told in result.told)
                self._record(step_count, ended, spent, shares.counts[self.rank])
                spent = {}
                if done or step_count % training.eval_steps == 0:
                    spent["evaluation"] = self._timed("evaluation", self.evaluate)
                if done or leaving or step_count % training.save_steps == 0:
                    spent["checkpoint"] = self._timed("commit", self.commit)
                if spent:
                    self._record(step_count, time.monotonic(), spent, 0)
                if leaving and not done:
                    return Outcome("left", step_count, seconds=self.seconds)
                changed, counts = self._follow(result.told, counts), shares.counts
                if changed:
                    shares = self.pace.shares
                    self._read(shares)
            self._timed("commit", worker.checkpoints.wait)
        finally:
            worker.enter("closing", self.engine.step_count)  # a collective that broke is no step without progress
            self._read_ahead.close()
            trace.close()
            worker.traced = worker.traced or trace.written
        return Outcome("finished", self.engine.step_count, seconds=self.seconds)

    def _trace(self) -> StepTrace:
        """Of the first worker's steps, until one was written."""
        worker = self.worker
        steps = self.recipe.tracking.profile_steps if self.rank == 0 and not worker.traced else 0
        folder = worker.config.storage / f"runs/{self.recipe.name}/traces"
        return StepTrace(self.engine.step_count, steps, folder, worker.say)

    def evaluate(self) -> None:
        """The held-out loss, computed by all ranks together."""
        held_out = self.recipe.data.held_out_sequences
        if not held_out:
            return
        pace = self.pace
        shares = plan_shares(held_out, pace.speeds, pace.limits, self.engine.equal_micro_batches)
        own = shares.ranges(0)[self.rank]
        batch = self.worker.held_out.read(own.start, own.stop)
        loss, tokens = self.engine.evaluate(_pieces(_tensors(batch), shares.micro_batches[self.rank]))
        if self.rank == 0:
            content = {"step": self.engine.step_count, "held_out_loss": loss, "held_out_tokens": tokens}
            self.board.post.remote("evaluation", content)

    def commit(self) -> None:
        """Hand a copy of the state to the checkpoint writer; all ranks gather it."""
        state = self.engine.state()
        if state is not None:
            memory = {"position": asdict(self.position), "recipe": to_dict(self.recipe)}
            self.worker.held = (state, memory)
            self.worker.checkpoints.save(state, memory, self._settle)

    def _settle(self) -> None:
        """Let the driver deal with all that was told it, before a checkpoint appears that is ahead of it."""
        self.worker.config.claim.check()
        if reason := ray.get(self.board.settle.remote()):
            raise UserError(reason)

    def _pace(self) -> Pace:
        """The shares to begin with, from what every member knows of itself."""
        worker, training = self.worker, self.recipe.training
        limit, length = training.micro_batch_size, self.recipe.data.sequence_length
        if limit is None:
            limit = micro_batch_size(self.engine, length, training.global_batch_size, CPU_MICRO_BATCH, self._cache)
        worker.limit = min(limit, worker.limit or limit)
        known = self.engine.tell_all([worker.speed, float(worker.limit)])
        speeds = [speed or None for speed, _ in known]
        if self.recipe.scaling.shares == "equal":
            speeds = [None] * self.world_size
        limits = [int(limit) for _, limit in known]
        return Pace(training.global_batch_size, limits, self.engine.equal_micro_batches, speeds)

    def _follow(self, told: list[list[float]], counts: tuple[int, ...]) -> bool:
        """Take in what all members told of the step before; True if the next step is shared out otherwise."""
        changed = False
        for rank, (_, _, limit) in enumerate(told):
            if limit and int(limit) != self.pace.limits[rank]:
                self.pace.set_limit(rank, int(limit))
                changed = True
        seconds = [seconds for _, seconds, _ in told]
        if any(seconds) and self.recipe.scaling.shares == "measured":
            changed |= self.pace.observe(seconds, counts)
            self.worker.speed = self.pace.speeds[self.rank]
        return changed

    def _read(self, shares: Shares) -> None:
        """Read ahead this rank's share of every step to come."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        training, start = self.recipe.training, self.position.next_sequence
        steps = range(training.max_steps - self.engine.step_count)
        own = (shares.ranges(start + step * training.global_batch_size)[self.rank] for step in steps)
        self._read_ahead = self.reader.prefetch((share.start, share.stop) for share in own)
        if self._abandoned.is_set():
            self._read_ahead.stop()

    def _timed(self, phase: str, act: Callable[[], object]) -> float:
        began = time.monotonic()
        self.worker.enter(phase, self.engine.step_count)
        act()
        return time.monotonic() - began

    def _check_finite(self, result: StepResult, step: int) -> None:
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return
        with suppress(Exception):  # rank 0's last good state may still be on its way to the storage
            self._timed("commit", lambda: self.worker.checkpoints.wait(FAREWELL_SECONDS))
        self.engine.tell_all([0.0])  # so that every rank names the same checkpoint
        first, steps = self.position.next_sequence, self.worker.checkpoints.steps()
        last = f"the last checkpoint is of step {steps[-1]:,}" if steps else "there is no checkpoint yet"
        raise UserError(
            f"In step {step + 1:,} (sequences {first:,} to {first + self.recipe.training.global_batch_size - 1:,}) the "
            f"loss was {result.loss} and the gradient norm {result.grad_norm}; {last}: go on from one with a lower "
            "--optimizer.lr under another --name."
        )

    def note_limit(self, limit: int) -> None:
        """Take fewer sequences at once, from the next step or membership on."""
        self.worker.limit = limit
        circumstances = micro_batch_circumstances(self.engine, self.recipe.data.sequence_length)
        self._cache.put(circumstances, limit, is_limit=True)
        self.worker.say(
            f"Worker {self.rank} ran out of memory: from now on it takes at most {limit} sequences at once."
        )

    def _tell_samples(self, step: int, own: range, batch: Sequences) -> None:
        if self.recipe.training.record_samples:
            self.board.post.remote("samples", (step, own.start, [tuple(sample) for sample in batch.samples]))

    def _tell_start(self, first_step: float) -> None:
        self.seconds["first step"] = first_step
        content = {
            "membership": self.membership.number,
            "rank": self.rank,
            "step": self.engine.step_count - 1,
            "device": device_name(self.device),
            "precision": str(self.engine.dtype).removeprefix("torch."),
            "share": self.pace.shares.counts[self.rank],
            "micro_batch_limit": self.worker.limit,
            "seconds": self.seconds,
        }
        self.board.post.remote("member", content)

    def _record(self, step: int, ended: float, spent: dict[str, float], sequences: int) -> None:
        """One line of the ledger: where this worker's time went since its last one."""
        energy = energy_joules(self.device)
        used = energy - self._energy if energy is not None and self._energy is not None else None
        self._energy = energy
        worker = self.worker
        self.board.post.remote(
            "ledger",
            StepRecord(
                worker.host, worker.node, device_name(self.device), self.membership.number, step,
                ended + worker.clock_offset, dict(spent), sequences, used,
            ),
        )  # fmt: skip

    def _tell_step(self, result: StepResult, factor: float, seconds: float, waited: float) -> None:
        sequence_length = self.recipe.data.sequence_length
        tokens_per_s = self.recipe.training.global_batch_size * sequence_length / seconds
        content = {
            "step": self.engine.step_count,
            "loss": result.loss,
            "learning_rate": self.recipe.optimizer.lr * factor,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens_per_s,
            "tokens_seen": self.position.tokens_seen,
            "data_wait_s": waited,
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            "workers": self.world_size,
        }
        if self.peak_tflops:
            flops = tokens_per_s * flops_per_token(self.model_config, sequence_length)
            content["mfu"] = flops / (self.world_size * self.peak_tflops * 1e12)
        self.board.post.remote("step", content)
        if self.engine.step_count % self.recipe.training.logging_steps == 0:
            usage = pop_expert_usage(self.engine.module)
            if usage:
                means = {key: sum(layer[key] for layer in usage) / len(usage) for key in usage[0]}
                content = {f"experts/{key}": value for key, value in means.items()}
                self.board.post.remote("experts", {"step": self.engine.step_count} | content)


def _tensors(batch: Sequences) -> dict[str, torch.Tensor]:
    """Model inputs, ``(sequences, sequence_length)``."""
    return {
        "input_ids": torch.from_numpy(batch.tokens),
        "position_ids": torch.from_numpy(batch.position_ids),
        "labels": torch.from_numpy(batch.labels),
    }


def _pieces(batch: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> Iterator[dict[str, torch.Tensor]]:
    ends = list(accumulate(sizes))
    return (
        {key: value[end - size : end] for key, value in batch.items()} for size, end in zip(sizes, ends, strict=True)
    )


def _unpacked(given: Given) -> tuple[TrainState, dict[str, Any]]:
    """The state that lies in the object store, without a copy: the engine only reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it
        parameters = {name: torch.from_numpy(array) for name, array in given.parameters.items()}
        moments = {
            key: {name: torch.from_numpy(array) for name, array in part.items()} for key, part in given.moments.items()
        }
    return TrainState(given.step, parameters, moments), given.memory
