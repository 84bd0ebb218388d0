"""The DeepSpeed step: gradients of one global batch, however it was shared out, and one update.

An engine belongs to one process group. Its state leaves it and enters it as full fp32 tensors by parameter name, so
that it can be carried to an engine of any other size and ZeRO stage.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from doge.errors import UserError
from doge.optimizer import OptimizerRecipe

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineRecipe:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions: 1 optimizer states, 2 gradients as well, 3 parameters as well."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto`` is bf16 where the device computes it natively, fp32 elsewhere; master weights are fp32 either way."""

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


@dataclass
class TrainState:
    """What a run is, apart from its recipe: copies in host memory, complete on rank 0.

    ``parameters`` and each of ``moments`` map parameter names to fp32 tensors; ``step`` counts updates made.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the loss tokens of the global batch, in nats."""
    grad_norm: float
    loss_tokens: int


def check_fits(state: TrainState, model: torch.nn.Module) -> None:
    """Raise UserError unless the state is one of this very model."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in sorted(shapes.keys() | state.parameters.keys()):
        found = state.parameters[name].shape if name in state.parameters else None
        if shapes.get(name) != found:
            raise UserError(
                f"The checkpoint is of another model: {name} is {_shape(found)} there and {_shape(shapes.get(name))} "
                "in the recipe; choose the recipe's model to match."
            )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape))


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
        self.equal_micro_batches = recipe.zero_stage >= 2
        if state is not None:
            check_fits(state, model)
            model.load_state_dict(state.parameters, strict=False)  # tied weights have one name only
        self.dtype = recipe.dtype(device)
        deepspeed = _import_deepspeed(device)
        # DeepSpeed broadcasts the parameters from rank 0 and keeps its fp32 copies in the optimizer.
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer.build(model), config=_config(recipe, self.dtype, optimizer)
        )
        self._peak_lr = optimizer.lr
        self._grad_norm = float("nan")
        if recipe.zero_stage == 0:  # DeepSpeed would clip, but not tell the norm
            self._engine.optimizer.register_step_pre_hook(self._clip(optimizer.max_grad_norm))
        self.step_count = 0
        self._fill_moments(0 if state is None else state.step)
        if state is not None:
            self._restore(state)

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def step(self, micro_batches: Iterable[dict[str, torch.Tensor]], lr_factor: float) -> StepResult:
        """One update from this rank's micro-batches of the global batch.

        Ranks may bring different numbers of micro-batches under ZeRO 0 and 1, none included; equal numbers under 2 and
        3. The gradient is the mean over every loss token of all ranks.

        Args:
            micro_batches: ``input_ids``, ``labels`` and ``position_ids``, each ``(batch, sequence)``.
            lr_factor: the peak learning rate is multiplied by it.
        """
        micro_batches = list(micro_batches)
        own_tokens = sum(_loss_tokens(batch["labels"]) for batch in micro_batches)
        loss_tokens = int(self._sum(torch.tensor(own_tokens, dtype=torch.float64)))
        if loss_tokens == 0:
            raise UserError("A global batch holds no token to learn from: check the sources' documents.")
        self._engine.train()
        total = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            loss_sum = self._loss_sum(batch)
            total += loss_sum.detach().double().cpu()
            # DeepSpeed averages gradients over ranks; the sum over ranks is what the mean over tokens needs.
            self._engine.backward(loss_sum * (self.world_size / loss_tokens), scale_wrt_gas=False)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._peak_lr * lr_factor
        self._engine.step()
        self.step_count += 1
        loss = float(self._sum(total)) / loss_tokens
        grad_norm = self._engine.get_global_grad_norm()
        return StepResult(loss, float(self._grad_norm if grad_norm is None else grad_norm), loss_tokens)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[dict[str, torch.Tensor]]) -> tuple[float, int]:
        """Mean loss in nats over the loss tokens that all ranks bring together, and their number.

        Under ZeRO 3 every rank must bring as many micro-batches.
        """
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in micro_batches:
            totals[0] += self._loss_sum(batch).double().cpu()
            totals[1] += _loss_tokens(batch["labels"])
        loss_sum, loss_tokens = self._sum(totals).tolist()
        return loss_sum / max(loss_tokens, 1.0), int(loss_tokens)

    def state(self) -> TrainState | None:
        """The full state as copies in host memory on rank 0, None elsewhere; every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
        for name, parameter in self._named_parameters():
            plain = self._plain_state(parameter)
            full = plain["parameter"] if plain else safe_get_full_fp32_param(parameter)
            states = {
                moment: plain[moment] if plain else safe_get_full_optimizer_state(parameter, moment)
                for moment in MOMENTS
            }
            if self.rank == 0:
                parameters[name] = full.detach().to("cpu", torch.float32, copy=True)
                for moment, value in states.items():
                    moments[moment][name] = value.detach().to("cpu", torch.float32, copy=True)
        return TrainState(self.step_count, parameters, moments) if self.rank == 0 else None

    def _fill_moments(self, step: int) -> None:
        """Give AdamW its state before the first step: DeepSpeed links only the first parameter group's otherwise."""
        optimizer = self._engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        for partition in self._partitions():
            inner.state[partition] = {"step": torch.tensor(float(step))} | {
                moment: torch.zeros_like(partition, dtype=torch.float32) for moment in MOMENTS
            }
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _restore(self, state: TrainState) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        self.step_count = state.step
        for name, parameter in self._named_parameters():
            weight = state.parameters[name].to(self.device)
            values = {moment: state.moments[moment][name].to(self.device) for moment in MOMENTS}
            if hasattr(parameter, "ds_id"):  # the full setters fail where a parameter does not divide by the ranks
                safe_set_local_fp32_param(parameter, self._own_part(weight, parameter))
                for moment, value in values.items():
                    safe_set_local_optimizer_state(parameter, self._own_part(value, parameter), moment)
            elif (plain := self._plain_state(parameter)) is not None:
                for moment, value in values.items():
                    plain[moment].copy_(value)
            else:
                safe_set_full_fp32_param(parameter, weight)
                for moment, value in values.items():
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _own_part(self, value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """This rank's partition of a full tensor under ZeRO 3, the last one padded with zeros."""
        size = parameter.partition_numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded.narrow(0, size * self.rank, size)

    def _clip(self, max_norm: float):
        def hook(optimizer, *_) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

        return hook

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _partitions(self) -> list[torch.Tensor]:
        """The fp32 tensors that the inner AdamW updates on this rank."""
        optimizer = self._engine.optimizer
        for attribute in (
            "fp32_partitioned_groups_flat",  # ZeRO 3
            "single_partition_of_fp32_groups",  # ZeRO 1 and 2
            "fp32_groups_flat_partition",  # ZeRO 1 in bf16
        ):
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _plain_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor] | None:
        """Parameter and moments where AdamW holds them itself (ZeRO 0), else None."""
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return None
        return {"parameter": parameter} | {m: self._engine.optimizer.state[parameter][m] for m in MOMENTS}

    def _loss_sum(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Summed loss of a micro-batch, scalar fp32."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return self._engine(**batch, use_cache=False, reduction="sum").loss

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of an fp64 tensor over ranks, back on the CPU."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()


def _loss_tokens(labels: torch.Tensor) -> int:
    """Positions that are predicted: the first of a row never is."""
    return int((labels[:, 1:] != -100).sum())


def _config(recipe: EngineRecipe, dtype: torch.dtype, optimizer: OptimizerRecipe) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the caller owns the step boundary: ranks bring what they have
        "gradient_clipping": optimizer.max_grad_norm if recipe.zero_stage else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": recipe.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _import_deepspeed(device: torch.device):
    """DeepSpeed for this device, without the shared-memory extension that it would compile for a minute on CPUs."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it prints its whole configuration at INFO
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
