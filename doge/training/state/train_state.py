"""The state of a training as full fp32 tensors by parameter name, and how a DeepSpeed engine reads and writes it.

Engines of any size and ZeRO stage exchange states directly, with no tool in between.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from doge.common.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The tensors of a run: copies in host memory, complete on rank 0.

    ``parameters`` and each of ``moments`` map parameter names to fp32 tensors; ``step`` counts updates made. Frozen
    parameters are among the parameters as they are, and have no moments.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]


def check_fits(state: TrainState, model: torch.nn.Module) -> None:
    """Raise UserError unless the state's parameters have the names and shapes of the model's."""
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


def freeze(model: torch.nn.Module, trainable: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Stop training the parameters whose names are not ``trainable``.

    Returns:
        The frozen ones by name, in fp32 as they are: a model in bf16 would give them back rounded.

    Raises:
        UserError: nothing would be trained.
    """
    frozen = {}
    for name, parameter in model.named_parameters():
        if not trainable(name):
            parameter.requires_grad_(False)
            frozen[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("All parameters of the model are frozen: name some that are trained.")
    return frozen


def gather_state(engine: "DeepSpeedEngine", step: int, frozen: Mapping[str, torch.Tensor]) -> TrainState | None:
    """The full state as copies in host memory on rank 0, None elsewhere; every rank must call it.

    Args:
        frozen: the parameters that are not trained, as `freeze` gave them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = TrainState(step, dict(frozen), {moment: {} for moment in MOMENTS})
    for name, parameter in _named_parameters(engine):
        plain = _plain_state(engine, parameter)
        full = plain["parameter"] if plain else safe_get_full_fp32_param(parameter)
        moments = {
            moment: plain[moment] if plain else safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS
        }
        if dist.get_rank() == 0:
            state.parameters[name] = full.detach().to("cpu", torch.float32, copy=True)
            for moment, value in moments.items():
                state.moments[moment][name] = value.detach().to("cpu", torch.float32, copy=True)
    return state if dist.get_rank() == 0 else None


def fill_moments(engine: "DeepSpeedEngine", step: int) -> None:
    """Create AdamW's state before the first step; otherwise DeepSpeed links only that of the first parameter group."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    for partition in _partitions(optimizer):
        inner.state[partition] = {"step": torch.tensor(float(step), device=partition.device)} | {
            moment: torch.zeros_like(partition, dtype=torch.float32) for moment in MOMENTS
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def restore(engine: "DeepSpeedEngine", state: TrainState) -> None:
    """Write the state, which is the same on every rank, into an engine whose moments are filled."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    for name, parameter in _named_parameters(engine):
        weight = state.parameters[name].to(engine.device)
        moments = {
            # a parameter that was frozen until now has none
            moment: state.moments[moment].get(name, torch.zeros(weight.shape)).to(engine.device)
            for moment in MOMENTS
        }
        if hasattr(parameter, "ds_id"):  # the full setters fail where a parameter does not divide by the ranks
            safe_set_local_fp32_param(parameter, _own_part(weight, parameter))
            for moment, value in moments.items():
                safe_set_local_optimizer_state(parameter, _own_part(value, parameter), moment)
        elif (plain := _plain_state(engine, parameter)) is not None:  # the weights are those of the model itself
            for moment, value in moments.items():
                plain[moment].copy_(value)
        else:
            safe_set_full_fp32_param(parameter, weight)
            for moment, value in moments.items():
                safe_set_full_optimizer_state(parameter, value, moment)


@torch.no_grad()
def overwrite(engine: "DeepSpeedEngine", state: TrainState) -> None:
    """`restore`, for an engine alone in its group that holds another state: its weights and AdamW's count too."""
    for name, parameter in engine.module.named_parameters():
        parameter.copy_(state.parameters[name])
    count_steps(engine, state.step)
    restore(engine, state)


def count_steps(engine: "DeepSpeedEngine", step: int) -> None:
    """Let AdamW believe that it has made so many steps, as its bias correction depends on them."""
    for values in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        values["step"].fill_(step)


def gradients(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """The fp32 gradients that an engine alone in its group has added up, to be changed in place before its step.

    As many of the same shapes on every rank: parameters that its passes did not touch count as zero.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # ZeRO 1 in bf16
        optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.fp32_groups_gradients]
        return list(optimizer.fp32_groups_gradients_flat)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]


def _named_parameters(engine: "DeepSpeedEngine") -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _own_part(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's partition of a full tensor under ZeRO 3, the last one padded with zeros."""
    size = parameter.partition_numel()  # type: ignore[attr-defined]  # a method that DeepSpeed adds
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def _partitions(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The fp32 tensors that the inner AdamW updates on this rank."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 in bf16
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plain_state(engine: "DeepSpeedEngine", parameter: torch.nn.Parameter) -> dict[str, torch.Tensor] | None:
    """Parameter and moments where AdamW holds them itself (ZeRO 0), else None."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return None
    return {"parameter": parameter} | {moment: engine.optimizer.state[parameter][moment] for moment in MOMENTS}
