"""Muon for the matrices of a model and AdamW for the rest, as one optimizer that DeepSpeed can flatten.

Muon takes a step of the same size in every direction of a matrix: it updates by the nearest orthogonal matrix to the
momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The formula is torch's; what is added here is
that DeepSpeed may lay a whole group end to end in one flat tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

from doge.common.errors import UserError


class MuonAdamW(torch.optim.Optimizer):
    """Updates some groups of matrices by `torch.optim.Muon` and the others by `torch.optim.AdamW`.

    The momentum lies in ``exp_avg`` of a parameter's state, where AdamW has its first moment; Muon has no second.

    Args:
        matrices: a group with ``params`` (2-dimensional), ``lr``, ``weight_decay`` and ``momentum``.
        adamw: updates the rest.
    """

    def __init__(self, matrices: dict[str, Any], adamw: torch.optim.AdamW):
        shapes = [parameter.shape for parameter in matrices["params"]]
        super().__init__([matrices | {"shapes": shapes}, *adamw.param_groups], {})
        self._adamw = adamw
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.step()
        for group in self.param_groups:
            if "shapes" in group:
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        matrices: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        momenta: list[torch.Tensor] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            if "step" in state:
                state["step"] += 1
            shapes = [parameter.shape] if parameter.ndim == 2 else group["shapes"]
            for found, tensor in ((matrices, parameter), (gradients, parameter.grad), (momenta, state["exp_avg"])):
                found += _matrices(tensor, shapes)
        muon(
            matrices,
            gradients,
            momenta,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=True,
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=DEFAULT_NS_STEPS,
            eps=EPS,
            adjust_lr_fn="original",  # by the root of height over width: one rate serves all widths
            has_complex=False,
        )


def check_whole(optimizer: torch.optim.Optimizer, zero_stage: int, world_size: int) -> None:
    """Raise UserError if a rank would hold only parts of Muon's matrices."""
    if isinstance(optimizer, MuonAdamW) and zero_stage > 0 and world_size > 1:
        raise UserError(
            f"optimizer.hidden_matrices = muon needs whole matrices on every worker, and ZeRO-{zero_stage} gives each "
            f"of the {world_size} workers a part: set --engine.states replicated, or --engine.zero-stage 0 with "
            "--engine.precision fp32."
        )


def _matrices(tensor: torch.Tensor, shapes: list[torch.Size]) -> Iterator[torch.Tensor]:
    """Views of a tensor that holds matrices end to end, and maybe padding behind them."""
    flat, start = tensor.view(-1), 0
    for shape in shapes:
        yield flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
