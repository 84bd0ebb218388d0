"""The DeepSpeed step: gradients of one global batch, however it was shared out, and one update.

An engine belongs to one process group. Its state leaves it and enters it as full fp32 tensors by parameter name, so
that it can be carried to an engine of any other size and ZeRO stage.
"""

import gc
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from doge.common.errors import UserError
from doge.model.compilation import compile_layers
from doge.training.micro_batch import OutOfMemory, fits, nothing_fits
from doge.training.optimizer import OptimizerRecipe
from doge.training.state.train_state import TrainState, check_fits, fill_moments, gather, restore
from doge.training.step_clock import StepClock


@dataclass(frozen=True)
class EngineRecipe:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions: 1 optimizer states, 2 gradients as well, 3 parameters as well."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto`` is bf16 where the device computes it natively, fp32 elsewhere; master weights are fp32 either way."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the layers, whose cache on disk outlives a restart; ``auto`` on a GPU, where it pays from the
    first minutes, ``on`` also on a CPU, where compiling takes half a minute of every worker's first start."""

    def check(self) -> None:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise UserError(
                "engine.zero_stage = 0 keeps no fp32 master weights in bf16: "
                "use --engine.zero-stage 1, or --engine.precision fp32."
            )

    def dtype(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            native = self.zero_stage > 0 and _computes_bf16(device)
            return torch.bfloat16 if native else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the loss tokens of the global batch, in nats."""
    grad_norm: float
    loss_tokens: int
    told: list[list[float]] = field(default_factory=list)
    """What every rank told in this step, by rank; the same on all of them."""
    micro_batch_limit: int | None = None
    """The most sequences that a micro-batch of this rank may have from now on, where the step found that out."""
    compute_seconds: float = 0.0
    """This rank's own forward and backward passes, without waiting and without an attempt that ran out of memory.

    Under ZeRO 3 on a GPU it is an upper bound, for the gathers run beside it on streams of their own.
    """
    wait_seconds: float = 0.0
    """In collectives: waiting for other ranks, and the communication itself."""


class Engine:
    """A model under DeepSpeed in the current process group.

    Args:
        model: fp32, on the CPU, equal on every rank.
        optimizer: its recipe.
        recipe: ZeRO stage and precision.
        device: where to train.
        state: where to go on from; every rank gives the same one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerRecipe,
        recipe: EngineRecipe,
        device: torch.device,
        state: TrainState | None = None,
    ):
        recipe.check()
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.zero_stage = recipe.zero_stage
        self.equal_micro_batches = recipe.zero_stage >= 2
        if state is not None:
            check_fits(state, model)
            model.load_state_dict(state.parameters, strict=False)  # tied weights have one name only
        self.dtype = recipe.dtype(device)
        deepspeed = import_deepspeed(device)
        _forget_engines()
        # DeepSpeed broadcasts the parameters from rank 0 and keeps its fp32 copies in the optimizer.
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer.build(model),
            config=_config(recipe, self.dtype, optimizer, sum(p.numel() for p in model.parameters())),
        )
        compiles = recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda")
        # ZeRO 3 gathers within the layers, which would cut every graph to pieces.
        self.compiled = compiles and recipe.zero_stage < 3 and compile_layers(self.module)
        self._clock = StepClock(device)  # of what is under way or was last
        self._abandoned = False
        self._peak_lr = optimizer.lr
        self._grad_norm = torch.nan
        if recipe.zero_stage == 0:  # DeepSpeed would clip, but not tell the norm
            self._engine.optimizer.register_step_pre_hook(self._clip(optimizer.max_grad_norm))
        self.step_count = 0
        fill_moments(self._engine, 0 if state is None else state.step)
        if state is not None:
            self.step_count = state.step
            restore(self._engine, state)

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def waiting(self) -> bool:
        """Whether what is under way waits for other ranks; may be asked from any thread."""
        return self._clock.current == "wait"

    def close(self) -> None:
        """Free the memory of the engine, which is of no use after; within its group or when that is left.

        Nothing is communicated. A collective that hangs on a GPU must be aborted before, for the GPU is waited for.

        Only to drop it is not enough under ZeRO 1 to 3: DeepSpeed's hooks refer to the model and to the engine from
        where the garbage collector does not see them, so that all tensors are taken out of both.
        """
        parameters, optimizer = list(self.module.parameters()), self._engine.optimizer
        with suppress(AssertionError, ValueError):  # outside the group it fails to print that the hooks are removed
            self._engine.destroy()
        for parameter in parameters:
            parameter.grad = None
            parameter.data = torch.empty(0)
            vars(parameter).clear()
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.state.clear()
        inner.param_groups.clear()
        vars(optimizer).clear()
        self._engine = None
        _forget_engines()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def abandon(self) -> None:
        """From another thread: let the step or evaluation under way, which is in vain, end after its micro-batch.

        It raises RuntimeError then.
        """
        self._abandoned = True

    def step(
        self,
        batch: dict[str, torch.Tensor],
        micro_batch_sizes: Sequence[int],
        lr_factor: float,
        tell: Sequence[float] = (),
    ) -> StepResult:
        """One update from this rank's share of the global batch.

        The gradient is the mean over every loss token of all ranks. Ranks may bring different numbers of micro-batches
        under ZeRO 0 and 1, none included; equal numbers under 2 and 3.

        Where a micro-batch does not fit in memory under ZeRO 0 and 1, in which passes communicate nothing, this rank
        forgets what it has of the step and begins it again with micro-batches of half the size.

        Args:
            batch: ``input_ids``, ``labels`` and ``position_ids``, each ``(sequences, sequence_length)``.
            micro_batch_sizes: sequences in each micro-batch, in order; 0 is one that only fills up.
            lr_factor: the peak learning rate is multiplied by it.
            tell: numbers for ``told`` of all ranks' results; as many on every rank.

        Raises:
            OutOfMemory: the optimizer's step does not fit, or a micro-batch under ZeRO 2 and 3.
            UserError: no token to learn from, or not even a micro-batch of one sequence fits.
        """
        sequences = len(batch["labels"])
        if sum(micro_batch_sizes) != sequences:
            raise ValueError(f"micro-batches of {list(micro_batch_sizes)} do not make up {sequences} sequences")
        # ZeRO 1 reduces and clips on a rank only what its passes have touched.
        sizes, limit = list(micro_batch_sizes) or [0], None
        clock = self._clock = StepClock(self.device)
        # ZeRO 3 waits on other streams than the one that computes, where events would mean nothing.
        with nullcontext() if self._gathers_aside else clock.watch_collectives():
            told = self.tell_all([_loss_tokens(batch["labels"]), *tell])
            loss_tokens = int(sum(row[0] for row in told))
            if loss_tokens == 0:
                raise UserError("A global batch holds no token to learn from: check the sources' documents.")
            self._engine.train()
            while True:
                try:
                    with clock.span("compute"):
                        # DeepSpeed averages gradients over ranks; the sum is what the mean over tokens needs.
                        loss_sum = self._accumulate(batch, sizes, self.world_size / loss_tokens)
                    break
                except OutOfMemory as error:
                    if self.equal_micro_batches:
                        raise
                    limit = error.limit
                clock.rename("compute", "lost")
                self._discard_gradients()
                sizes = [min(limit, sequences - start) for start in range(0, sequences, limit)] or [0]
            for group in self._engine.optimizer.param_groups:
                group["lr"] = self._peak_lr * lr_factor
            if not fits(self._engine.step):
                raise self._too_large(max(sizes))
            with clock.span("wait"):
                loss = float(self._sum(loss_sum)) / loss_tokens
        self.step_count += 1
        grad_norm = self._engine.get_global_grad_norm()
        seconds = clock.seconds()
        return StepResult(
            loss=loss,
            grad_norm=float(self._grad_norm if grad_norm is None else grad_norm),
            loss_tokens=loss_tokens,
            told=[row[1:] for row in told],
            micro_batch_limit=limit,
            compute_seconds=seconds["compute"],
            wait_seconds=seconds["wait"],
        )

    def rehearse(self, size: int, sequence_length: int) -> None:
        """Forward and backward passes of a micro-batch of ``size`` full sequences, which change nothing.

        Under ZeRO 0 and 1 they are the step's own, twice: the second pass finds the gradients of the first in memory.
        Under 2 and 3 those would communicate, so they are a plain copy's, with its whole weights and gradients and an
        fp32 gradient beside: no less than the partitioned model takes at its peak.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            tokens = torch.randint(self.module.config.vocab_size, (size, sequence_length))
            positions = torch.arange(sequence_length).expand(size, -1)
            batch = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
            if self.equal_micro_batches:
                self._rehearse_alone(batch)
                return
            self._engine.train()
            try:
                for _ in range(2):
                    self._pass(batch, 1.0)
            finally:
                self._discard_gradients()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[dict[str, torch.Tensor]]) -> tuple[float, int]:
        """Mean loss in nats over the loss tokens that all ranks bring together, and their number.

        Under ZeRO 3 every rank must bring as many micro-batches; one without sequences only fills up.
        """
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            self._check_abandoned()
            totals[0] += self._loss_sum(self._engine, batch)
            totals[1] += _loss_tokens(batch["labels"])
        self._clock = StepClock(self.device)
        with self._clock.span("wait"):
            loss_sum, loss_tokens = self._sum(totals).tolist()
        return loss_sum / max(loss_tokens, 1.0), int(loss_tokens)

    def state(self) -> TrainState | None:
        """The full state as copies in host memory on rank 0, None elsewhere; every rank must call it."""
        self._clock = StepClock(self.device)
        with self._clock.span("wait"):
            return gather(self._engine, self.step_count)

    def _clip(self, max_norm: float):
        def hook(optimizer, *_) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)

        return hook

    @property
    def _gathers_aside(self) -> bool:
        return self.zero_stage == 3 and self.device.type == "cuda"

    def _accumulate(self, batch: dict[str, torch.Tensor], sizes: list[int], scale: float) -> torch.Tensor:
        """Add up the gradients of all micro-batches; their summed loss, an fp64 scalar on the device.

        Raises OutOfMemory with the memory freed, but for the gradients added up so far.
        """
        losses = [torch.zeros((), dtype=torch.float64, device=self.device)]
        start = 0
        for size in sizes:
            self._check_abandoned()
            rows = {key: value[start : start + size] for key, value in batch.items()}
            if not fits(lambda rows=rows: losses.append(self._pass(rows, scale))):
                raise self._too_large(size)
            start += size
        return torch.stack(losses).sum()

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise RuntimeError("The step was abandoned.")

    def _pass(self, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; its summed loss, fp64."""
        loss_sum = self._loss_sum(self._engine, batch)
        self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
        return loss_sum.detach().double()

    def _rehearse_alone(self, batch: dict[str, torch.Tensor]) -> None:
        with self.device:
            copy = type(self.module)(self.module.config).to(self.dtype)
        if self.module.is_gradient_checkpointing:
            copy.activation_checkpointing_enable()
        gradient = torch.empty(sum(p.numel() for p in copy.parameters()), dtype=torch.float32, device=self.device)
        for _ in range(2):
            self._loss_sum(copy.train(), batch).backward()
        del gradient

    def _too_large(self, size: int) -> Exception:
        return OutOfMemory(size // 2) if size > 1 else nothing_fits(self.device)

    def _discard_gradients(self) -> None:
        """Make the step as if none of its micro-batches had run; only for ZeRO 0 and 1.

        Their backward passes leave ``grad`` of the parameters and, in bf16, the fp32 sums of ``BF16_Optimizer``;
        one that broke off also leaves DeepSpeed's hooks believing that they are within it.
        """
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        while getattr(optimizer, "_backward_active_depth", 0):
            optimizer.exit_backward()
        self._engine._unmanaged_backward_count = 0

    def _loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Summed loss of a micro-batch, scalar fp32; one without sequences becomes a row that teaches nothing."""
        if len(batch["labels"]) == 0:
            row = torch.arange(batch["labels"].shape[1])[None]
            batch = {"input_ids": row * 0, "labels": row * 0 - 100, "position_ids": row}
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return model(**batch, use_cache=False, reduction="sum").loss

    def tell_all(self, numbers: list[float]) -> list[list[float]]:
        """Every rank's numbers by rank; exact, for each is only added to zeros."""
        table = torch.zeros(self.world_size, len(numbers), dtype=torch.float64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        with self._clock.span("wait"):
            return self._sum(table).tolist()

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of an fp64 tensor over ranks, back on the CPU."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()


def _loss_tokens(labels: torch.Tensor) -> int:
    """Positions that are predicted: the first of a row never is."""
    return int((labels[:, 1:] != -100).sum())


def _config(recipe: EngineRecipe, dtype: torch.dtype, optimizer: OptimizerRecipe, parameters: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the caller owns the step boundary: ranks bring what they have
        "gradient_clipping": optimizer.max_grad_norm if recipe.zero_stage else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": recipe.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(parameters, 500_000_000),  # allocated whole: 2 GB by default, at any model size
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _forget_engines() -> None:
    """Let ZeRO 3 number modules and parameters from 0, as in the processes of this group that have had no engine yet.

    It compares the numbers between ranks. It would also keep a model for ever as the one whose forward is under way.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()


def import_deepspeed(device: torch.device):
    """DeepSpeed for this device, without the shared-memory extension that it would compile for a minute on CPUs."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it prints its whole configuration at INFO
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
