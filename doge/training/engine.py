"""The DeepSpeed step: the gradient of one global batch, however it was shared out, and one update.

An engine belongs to one process group. Its state is read and written as full fp32 tensors by parameter name, so that
an engine of any other size and ZeRO stage can take it.
"""

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from doge.common.errors import UserError
from doge.model.compilation import compilation_progress, compile_layers
from doge.training.communicator import CommunicationError, Communicator
from doge.training.deepspeed_internals import (
    deepspeed_config,
    discard_gradients,
    forget_engines,
    free,
    import_deepspeed,
)
from doge.training.engine_recipe import EngineRecipe
from doge.training.memory import OutOfMemory, fits, nothing_fits
from doge.training.muon import check_whole
from doge.training.objective import Batch, LossSum, Objective
from doge.training.optimizer import OptimizerRecipe
from doge.training.state.train_state import (
    TrainState,
    check_fits,
    count_steps,
    fill_moments,
    freeze,
    gather_state,
    gradients,
    overwrite,
    restore,
)
from doge.training.step_clock import StepClock
from doge.training.step_result import StepRefused, StepResult


class Engine:
    """An objective's model under DeepSpeed.

    Its state is partitioned over the ranks of the current process group. With ``replicas``, that group is this process
    alone, which holds the whole state, and the ranks exchange their gradients through the communicator. Such an engine
    outlives its group: it can leave one that broke, as if the step under way had never begun, and join another.

    Args:
        objective: what is learnt; equal on every rank.
        optimizer: its recipe.
        recipe: ZeRO stage and precision.
        device: where to train.
        state: where to go on from; every rank gives the same one.
        replicas: the ranks that hold the whole state each.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerRecipe,
        recipe: EngineRecipe,
        device: torch.device,
        state: TrainState | None = None,
        replicas: Communicator | None = None,
    ):
        recipe.check()
        self.objective, self.device, self.replicas = objective, device, replicas
        self.dtype = recipe.dtype(device)
        # A replica has nobody to partition over; from stage 1 on DeepSpeed keeps fp32 master weights beside bf16 ones.
        self.zero_stage = recipe.zero_stage if replicas is None else int(self.dtype == torch.bfloat16)
        self.equal_micro_batches = self.zero_stage >= 2
        model = objective.build()
        if state is not None:
            check_fits(state, model)
            model.load_state_dict(state.parameters, strict=False)  # tied weights have one name only
        self._frozen = freeze(model, objective.trainable)
        deepspeed = import_deepspeed(device)
        forget_engines()
        self._max_grad_norm = max_grad_norm = optimizer.max_grad_norm
        num_parameters = sum(p.numel() for p in model.parameters())
        updates = optimizer.build(model)
        check_whole(updates, self.zero_stage, self.world_size if replicas is None else 1)
        # DeepSpeed broadcasts the parameters from rank 0 and keeps its fp32 copies in the optimizer.
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=updates,
            config=deepspeed_config(self.zero_stage, self.dtype, 0.0 if replicas else max_grad_norm, num_parameters),
        )
        compiles = recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda")
        # ZeRO 3 gathers within the layers, which would cut every graph to pieces.
        self.compiled = compiles and self.zero_stage < 3 and compile_layers(self.module)
        self._clock = StepClock(device)  # of what is under way or was last
        self._abandoned = False
        self._passes = 0
        self.whole = True  # no update is half made
        self._grad_norm: float | torch.Tensor = torch.nan
        if self.zero_stage == 0 and replicas is None:  # DeepSpeed would clip, but not tell the norm
            self._engine.optimizer.register_step_pre_hook(self._clip(max_grad_norm))
        self.step_count = 0
        fill_moments(self._engine, 0 if state is None else state.step)
        if state is not None:
            self.step_count = state.step
            restore(self._engine, state)
        elif replicas is not None:  # built from one seed, but maybe by another device's random numbers
            first = self.state()
            assert first is not None, "a replica has the whole state"
            replicas.broadcast(*first.parameters.values())  # those that are frozen are `_frozen`'s own
            overwrite(self._engine, first)

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.replicas is None else self.replicas.rank

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if self.replicas is None else self.replicas.size

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def progress(self) -> int:
        """Grows with every micro-batch, compilation, and piece that is exchanged; may be asked from any thread."""
        return self._passes + compilation_progress() + (self.replicas.progress if self.replicas is not None else 0)

    @property
    def waiting(self) -> bool:
        """Whether what is under way waits for other ranks; may be asked from any thread."""
        return self._clock.current == "wait"

    def close(self) -> None:
        """Free all memory, before or after leaving the group. The engine is unusable afterwards.

        Nothing is communicated. Abort a collective that hangs on a GPU first: this waits for the GPU.
        """
        free(self._engine)
        self._engine = None
        forget_engines()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def leave(self) -> None:
        """Let go of the replicas, as if the step under way had never begun. Nothing is communicated."""
        discard_gradients(self._engine)
        self.replicas, self._abandoned = Communicator(0, 1), False

    def join(self, replicas: Communicator) -> None:
        """Step with these replicas from now on, which hold the same state."""
        self.replicas = replicas

    def skip(self) -> None:
        """Count a step that updates nothing; only for a replica."""
        self.step_count += 1
        count_steps(self._engine, self.step_count)

    def load(self, state: TrainState) -> None:
        """Take up a state of the same model; only for a replica."""
        check_fits(state, self.module)
        overwrite(self._engine, state)
        self.step_count, self.whole = state.step, True

    def abandon(self) -> None:
        """Stop the current step or evaluation after its micro-batch; its result is discarded. Thread-safe.

        The call under way raises RuntimeError.
        """
        self._abandoned = True

    def step(
        self,
        batch: Batch,
        micro_batch_sizes: Sequence[int],
        lr_factor: float,
        gather: Sequence[float] = (),
        max_loss: float = math.inf,
    ) -> StepResult:
        """Make one update from this rank's share of the global batch.

        The gradient is the mean over the weight of all ranks' units. Ranks may bring different numbers of
        micro-batches under ZeRO 0 and 1, none included; equal numbers under 2 and 3.

        Where a micro-batch does not fit in memory under ZeRO 0 and 1, in which passes communicate nothing, this rank
        forgets what it has of the step and begins it again with micro-batches of half the size.

        Args:
            batch: this rank's units.
            micro_batch_sizes: units in each micro-batch, in order; a 0 is an empty one that only fills up.
            lr_factor: the peak learning rate is multiplied by it.
            gather: numbers that all ranks learn of each other in ``gathered``; as many on every rank.
            max_loss: replicas make no update from a loss beyond it.

        Raises:
            OutOfMemory: the optimizer's step does not fit, or a micro-batch under ZeRO 2 and 3.
            StepRefused: the loss or the gradient of replicas is no number, or the loss is beyond its bound.
            CommunicationError: the replicas cannot meet; the engine can leave them.
            UserError: nothing to learn from, or not even a micro-batch of one unit fits.
        """
        units = len(batch)
        if sum(micro_batch_sizes) != units:
            raise ValueError(f"micro-batches of {list(micro_batch_sizes)} do not make up {units} units")
        # ZeRO 1 reduces and clips on a rank only what its passes have touched.
        sizes, limit = list(micro_batch_sizes) or [0], None
        clock = self._clock = StepClock(self.device)
        # ZeRO 3 waits on other streams than the one that computes, where events would mean nothing.
        replicas = self.replicas
        with nullcontext() if self._gathers_aside or replicas is not None else clock.watch_collectives():
            gathered = self.all_gather_floats([self.objective.weight(batch), self.objective.flops(batch), *gather])
            weight, flops = (sum(row[at] for row in gathered) for at in (0, 1))
            if not weight > 0:
                raise UserError(
                    "A global batch holds nothing to learn from, no token that counts: check the sources' documents."
                )
            self._engine.train()
            while True:
                try:
                    with clock.span("compute"):
                        # DeepSpeed averages gradients over its ranks; the mean over the weight needs their sum.
                        averaged = self.world_size if replicas is None else 1
                        sums = self._accumulate(batch, sizes, averaged / weight)
                    break
                except OutOfMemory as error:
                    if self.equal_micro_batches:
                        raise
                    limit = error.limit
                clock.rename("compute", "lost")
                discard_gradients(self._engine)
                sizes = [min(limit, units - start) for start in range(0, units, limit)] or [0]
            with clock.span("wait"):
                if replicas is not None:
                    replicas.all_reduce(*gradients(self._engine))
                    norm = torch.nn.utils.get_total_norm(gradients(self._engine)).double()
                    sums = torch.cat([sums, norm[None]])
                totals = self._all_reduce(sums).tolist()
            if replicas is not None:
                self._clip_alike(totals.pop() / self.world_size, totals[0] / weight, max_loss)
            means = [total / weight for total in totals]
            for group in self._engine.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor
            self.whole = False
            if not fits(self._engine.step):
                raise self._too_large(max(sizes))
        self.step_count += 1
        self.whole = True
        grad_norm = self._engine.get_global_grad_norm() if replicas is None else None
        seconds = clock.seconds()
        return StepResult(
            loss=means[0],
            grad_norm=float(self._grad_norm if grad_norm is None else grad_norm),
            weight=weight,
            metrics=dict(zip(self.objective.metrics, means[1:], strict=True)),
            flops=flops,
            gathered=[row[2:] for row in gathered],
            micro_batch_limit=limit,
            compute_seconds=seconds["compute"],
            wait_seconds=seconds["wait"],
        )

    def rehearse(self, size: int, length: int) -> None:
        """Run the passes of the largest micro-batch of ``size`` units of ``length`` tokens, which change nothing.

        Under ZeRO 0 and 1 they are the step's own, twice: the second pass finds the gradients of the first in memory.
        Under 2 and 3 those would communicate, so they are a plain copy's, with its whole weights and gradients and an
        fp32 gradient beside: no less than the partitioned model takes at its peak.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            batch = self.objective.rehearsal(size, length)
            if self.equal_micro_batches:
                self._rehearse_alone(batch)
                return
            self._engine.train()
            try:
                for _ in range(2):
                    self._pass(batch, 1.0, [])
            finally:
                discard_gradients(self._engine)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, float]:
        """Mean loss over the weight of the units that all ranks bring together, and that weight.

        Under ZeRO 3 every rank must bring as many micro-batches; one without units only fills up.
        """
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            self._check_abandoned()
            self._passes += 1
            totals[0] += self._loss_sum(self._engine, batch).loss
            totals[1] += self.objective.weight(batch)
        self._clock = StepClock(self.device)
        with self._clock.span("wait"):
            loss_sum, weight = self._all_reduce(totals).tolist()
        return loss_sum / max(weight, 1.0), weight

    def state(self) -> TrainState | None:
        """The full state as copies in host memory on rank 0, None elsewhere; every rank must call it."""
        self._clock = StepClock(self.device)
        with self._clock.span("wait"):
            return gather_state(self._engine, self.step_count, self._frozen)

    def _clip(self, max_norm: float) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)

        return hook

    @property
    def _gathers_aside(self) -> bool:
        return self.zero_stage == 3 and self.device.type == "cuda"

    def _accumulate(self, batch: Batch, sizes: list[int], scale: float) -> torch.Tensor:
        """Add up the gradients of all micro-batches.

        Returns the summed loss and metrics, (1 + metrics,) fp64 on the device. Raises OutOfMemory with the memory
        freed, but for the gradients added up so far.
        """
        sums = [torch.zeros(1 + len(self.objective.metrics), dtype=torch.float64, device=self.device)]
        start = 0
        for size in sizes:
            self._check_abandoned()
            self._passes += 1
            piece = batch[start : start + size]
            if not fits(partial(self._pass, piece, scale, sums)):
                raise self._too_large(size)
            start += size
        return torch.stack(sums).sum(0)

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise CommunicationError("The step was abandoned.")

    def _clip_alike(self, norm: float, loss: float, max_loss: float) -> None:
        """Clip the gradient by its norm, which is the mean of all ranks' own: their devices may round differently.

        Raises StepRefused, with the step forgotten, unless loss and gradient are sound. The norm has waited for the
        device: what the group still exchanged when it was aborted must not be stepped with.
        """
        self._check_abandoned()
        if not (loss <= max_loss and math.isfinite(loss) and math.isfinite(norm)):
            discard_gradients(self._engine)
            raise StepRefused(loss, norm, max_loss)
        self._grad_norm = norm
        if norm > self._max_grad_norm:
            torch._foreach_mul_(gradients(self._engine), self._max_grad_norm / (norm + 1e-6))  # as torch clips

    def _pass(self, batch: Batch, scale: float, sums: list[torch.Tensor]) -> None:
        """Forward and backward of one micro-batch; append its summed loss and metrics, fp64."""
        found = self._loss_sum(self._engine, batch)
        self._engine.backward(found.loss * scale, scale_wrt_gas=False)
        metrics = [found.metrics[name].detach() for name in self.objective.metrics]
        sums.append(torch.stack([found.loss.detach().double(), *(metric.double() for metric in metrics)]))

    def _rehearse_alone(self, batch: Batch) -> None:
        copy = self.objective.build().to(self.dtype).to(self.device)
        freeze(copy, self.objective.trainable)
        gradient = torch.empty(sum(p.numel() for p in copy.parameters()), dtype=torch.float32, device=self.device)
        for _ in range(2):
            self._loss_sum(copy.train(), batch).loss.backward()
        del gradient

    def _too_large(self, size: int) -> Exception:
        return OutOfMemory(size // 2) if size > 1 else nothing_fits(self.device)

    def _loss_sum(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """The loss of a micro-batch; an empty one becomes a dummy of weight 0."""
        batch = batch if len(batch) else self.objective.empty()
        return self.objective.loss_sum(model, batch.to(self.device))

    def all_gather_floats(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank, exactly; as many of each."""
        if self.replicas is not None:
            with self._clock.span("wait"):
                return self.replicas.all_gather(numbers)
        # Each slot is summed with zeros.
        table = torch.zeros(self.world_size, len(numbers), dtype=torch.float64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        with self._clock.span("wait"):
            return self._all_reduce(table).tolist()

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of an fp64 tensor over ranks, back on the CPU."""
        if self.replicas is not None:
            table = self.replicas.all_gather(values.flatten().tolist())
            return torch.tensor(table, dtype=torch.float64).sum(0).view(values.shape)
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()
