"""Muon for the matrices of a model and AdamW for the rest, as one optimizer that DeepSpeed can flatten.

Muon takes a step of the same size in every direction of a matrix: it updates by the nearest orthogonal matrix to the
momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The formula is torch's. Here matrices of one
shape are orthogonalised together, and DeepSpeed may lay a whole group end to end in one flat tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS

from doge.common.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]
"""A matrix and the direction of its update."""

_STACKED_ELEMENTS = 2**24  # of the matrices that are orthogonalised at once: it takes a few times their memory


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
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[torch.Size, list[Pair]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            if "step" in state:
                state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - momentum)
            direction = parameter.grad.lerp(state["exp_avg"], momentum)  # Nesterov's momentum
            parameter.mul_(1 - lr * group["weight_decay"])
            shapes = [parameter.shape] if parameter.ndim == 2 else group["shapes"]
            for matrix, update in zip(_matrices(parameter, shapes), _matrices(direction, shapes), strict=True):
                by_shape.setdefault(matrix.shape, []).append((matrix, update))
        for (rows, columns), pairs in by_shape.items():
            # One rate serves all widths: the update's gain, as that of fresh weights, depends on the shape alone.
            scale = -lr * max(1.0, rows / columns) ** 0.5
            for chunk in _chunks(pairs, rows * columns):
                updates = orthogonalize(torch.stack([update for _, update in chunk]))
                for (matrix, _), orthogonal in zip(chunk, updates, strict=True):
                    matrix.add_(orthogonal, alpha=scale)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix to each of a stack (matrices, rows, columns), in bfloat16.

    Five steps of the Newton-Schulz iteration bring every singular value near 1, between 0.7 and 1.2: the iteration of
    `torch.optim.Muon`, with its coefficients. As a stack, many small matrices take a third of the time.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(DEFAULT_NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=DEFAULT_B, alpha=DEFAULT_C), x, beta=DEFAULT_A)
    return x.mT if tall else x


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


def _chunks(pairs: list[Pair], size: int) -> Iterator[list[Pair]]:
    """Pairs of matrices of so many elements, as many at a time as may be stacked."""
    several = max(1, _STACKED_ELEMENTS // size)
    for start in range(0, len(pairs), several):
        yield pairs[start : start + several]
