"""What one worker does: enter the group, take up the run's state, and step until the run ends or the group changes."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from cluster.recipe import Recipe
from cluster.shares import equal_number, micro_batches, split_evenly
from data_pipelines.reader import Batch, Reader
from doge.checkpoint import Checkpoints, load_checkpoint
from doge.configuration import flops_per_token
from doge.engine import Engine, TrainState
from doge.errors import UserError
from doge.experts import pop_expert_usage, track_expert_usage
from doge.hardware import device_name, peak_memory_bytes, peak_tflops, use_cores
from doge.modeling import build_model
from doge.recipe import to_dict
from doge.storage import Storage


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver hands to every worker.

    Args:
        recipe: of the run.
        data_plan: fingerprint of the data's plan.
        start_from: path or URI of a checkpoint of another run to begin with.
        board: the board's actor handle.
    """

    recipe: Recipe
    data_plan: str
    start_from: str | None
    board: Any


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


def train(config: WorkerConfig) -> None:
    """The loop of one worker; Ray Train calls it in every process, anew after every change of the group."""
    if ray.get(config.board.stopped.remote()):
        return
    try:
        Worker(config).run()
    except UserError as error:  # restarting would only meet it again
        ray.get(config.board.stop.remote(str(error)))
        raise
    except Exception as error:  # a peer is gone, or this worker is about to be
        rank, reason = ray.train.get_context().get_world_rank(), " ".join(str(error).split())[:160]
        ray.get(config.board.post.remote("message", f"Worker {rank} stopped: {type(error).__name__}: {reason}"))
        raise


class Worker:
    """One rank of one membership: (workers, shares, engine)."""

    def __init__(self, config: WorkerConfig):
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        use_cores(context.get_local_world_size())
        self.recipe, self.board = config.recipe, config.board
        self.device = ray.train.torch.get_device()
        storage = Storage(self.recipe.storage)
        self.reader = Reader(storage, config.data_plan, on_wait=self._wait_message)
        self.checkpoints = Checkpoints(
            storage / f"runs/{self.recipe.name}/checkpoints", self.recipe.training.save_total_limit
        )
        state, self.position = self._starting_point(config)
        self.model_config = self.recipe.model.build()
        torch.manual_seed(self.recipe.training.seed)
        model = build_model(self.model_config)
        if self.recipe.training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.engine = Engine(model, self.recipe.optimizer, self.recipe.engine, self.device, state)
        track_expert_usage(self.engine.module)
        self.peak_tflops = self.recipe.tracking.peak_tflops or peak_tflops(self.device)

    def run(self) -> None:
        """Step until the recipe's last step is made and committed."""
        training = self.recipe.training
        self._tell_membership()
        first = self.engine.step_count
        batches = self.reader.prefetch(self._own_ranges(training.max_steps - first))
        ended = time.perf_counter()
        for step in range(first, training.max_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            factor = self.recipe.lr_scheduler.factor(step, training.max_steps)
            result = self.engine.step(self._tensors(batch), factor)
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                raise UserError(
                    f"In step {step + 1} the loss was {result.loss} and the gradient norm {result.grad_norm}; the last "
                    "checkpoint is from before: go on from there with a lower --optimizer.lr under another --name."
                )
            first_sequence = self.position.next_sequence
            self.position.next_sequence += training.global_batch_size
            self.position.tokens_seen += training.global_batch_size * self.recipe.data.sequence_length
            if training.record_samples:
                own = self._share(first_sequence)
                self.board.post.remote("samples", (step, own.start, [tuple(sample) for sample in batch.samples]))
            if self.rank == 0:
                self._tell_step(result, factor, time.perf_counter() - ended, waited)
            ended = time.perf_counter()
            self.checkpoints.check()
            done = step + 1 == training.max_steps
            if done or (step + 1) % training.eval_steps == 0:
                self.evaluate()
                ended = time.perf_counter()
            if done or (step + 1) % training.save_steps == 0:
                self.commit()
        self.checkpoints.wait()

    def evaluate(self) -> None:
        """The held-out loss, computed by all ranks together."""
        held_out = range(self.recipe.data.held_out_sequences)
        if not held_out:
            return
        shares = split_evenly(held_out, self.world_size) if len(held_out) >= self.world_size else None
        own = shares[self.rank] if shares else held_out[self.rank : self.rank + 1]
        number = equal_number(shares, self.recipe.training.micro_batch_size) if shares else 1
        pieces = micro_batches(own, self.recipe.training.micro_batch_size, number)
        read = (self.reader.read_held_out(piece.start, piece.stop) for piece in pieces)
        loss, tokens = self.engine.evaluate(self._to_tensors(batch) for batch in read)
        if self.rank == 0:
            content = {"step": self.engine.step_count, "held_out_loss": loss, "held_out_tokens": tokens}
            self.board.post.remote("evaluation", content)

    def commit(self) -> None:
        """Hand a copy of the state to the checkpoint writer; all ranks gather it."""
        state = self.engine.state()
        if state is not None:
            memory = {"position": asdict(self.position), "recipe": to_dict(self.recipe)}
            self.checkpoints.save(state, memory, self._settle)

    def _settle(self) -> None:
        """Let the driver deal with all that was told it, before a checkpoint appears that is ahead of it."""
        if reason := ray.get(self.board.settle.remote()):
            raise UserError(reason)

    def _starting_point(self, config: WorkerConfig) -> tuple[TrainState | None, Position]:
        """The newest whole checkpoint of the run, the one it starts from, or nothing; the same on every rank."""
        own = self.checkpoints.latest() if self.rank == 0 else None
        step = [own[0].step if own else None]
        if self.world_size > 1:
            dist.broadcast_object_list(step, device=self.device)
        if step[0] is not None:
            state, memory = own or self.checkpoints.load(step[0])
            position = Position(**memory["position"])
            if position.data_plan != config.data_plan:
                raise UserError(
                    f"The data of the run {self.recipe.name} is not what it was when it started (recipe, files or "
                    f"tokenizer): choose another --name, and --from one of its checkpoints to go on with other data."
                )
            return state, position
        if config.start_from is None:
            return None, Position(config.data_plan, self.reader.plan.tokenizer_fingerprint)
        state, memory = load_checkpoint(Storage(config.start_from))
        position = Position(**memory["position"])
        if position.data_plan != config.data_plan:  # other data is read from its own beginning
            position.data_plan, position.next_sequence = config.data_plan, 0
        return state, position

    def _own_ranges(self, steps: int) -> Iterator[tuple[int, int]]:
        start = self.position.next_sequence
        for step in range(steps):
            share = self._share(start + step * self.recipe.training.global_batch_size)
            yield share.start, share.stop

    def _share(self, first_sequence: int) -> range:
        """This worker's sequences of the step that begins with ``first_sequence``."""
        step = range(first_sequence, first_sequence + self.recipe.training.global_batch_size)
        return split_evenly(step, self.world_size)[self.rank]

    def _tensors(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """A worker's share of a step as micro-batches; as many as every other rank's where the engine needs that."""
        training = self.recipe.training
        shares = split_evenly(range(training.global_batch_size), self.world_size)
        number = equal_number(shares, training.micro_batch_size) if self.engine.equal_micro_batches else None
        for piece in micro_batches(range(len(batch.tokens)), training.micro_batch_size, number):
            rows = slice(piece.start, piece.stop)
            yield self._to_tensors(Batch(batch.tokens[rows], batch.position_ids[rows], batch.labels[rows], []))

    def _to_tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Model inputs, ``(sequences, sequence_length)``; an empty batch becomes one row that teaches nothing."""
        if len(batch.tokens) == 0:
            row = torch.arange(self.recipe.data.sequence_length)[None]
            return {"input_ids": torch.zeros_like(row), "position_ids": row, "labels": torch.full_like(row, -100)}
        return {
            "input_ids": torch.from_numpy(batch.tokens),
            "position_ids": torch.from_numpy(batch.position_ids),
            "labels": torch.from_numpy(batch.labels),
        }

    def _tell_membership(self) -> None:
        content = {
            "rank": self.rank,
            "world_size": self.world_size,
            "step": self.engine.step_count,
            "device": device_name(self.device),
            "precision": str(self.engine.dtype).removeprefix("torch."),
        }
        self.board.post.remote("membership", content)

    def _tell_step(self, result, factor: float, seconds: float, waited: float) -> None:
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

    def _wait_message(self, message: str) -> None:
        if reason := ray.get(self.board.stopped.remote()):
            raise UserError(reason)
        if self.rank == 0:
            self.board.post.remote("message", message)
