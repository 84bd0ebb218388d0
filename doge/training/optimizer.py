"""The optimizer: fused AdamW with weight decay on matrices only, and Muon, where chosen, for the hidden matrices."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch

from doge.common.errors import UserError
from doge.training.muon import MuonAdamW

# Muon orthogonalises a matrix; one of fewer rows or columns has nothing to gain by it.
_SMALLEST_SIDE = 16


@dataclass(frozen=True)
class OptimizerRecipe:
    lr: float = 8e-3
    """Peak learning rate, held through the stable phase."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of every matrix; norms, residual weights and the dynamic mask's ``A`` have none."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    hidden_matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the linear layers between embedding and output. ``muon`` learns in fewer steps, and needs whole
    matrices on every worker."""
    muon_lr: float = 1e-2
    """Peak learning rate of the matrices that Muon updates."""
    muon_momentum: float = 0.95
    """Decay rate of their gradients' mean."""

    def __post_init__(self):
        for name, fits, rule in (
            ("lr", 0 < self.lr < inf, "positive and finite"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1"),
            ("eps", 0 < self.eps < inf, "positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, "finite and not negative"),
            ("muon_lr", 0 < self.muon_lr < inf, "positive and finite"),
            ("muon_momentum", 0 <= self.muon_momentum < 1, "at least 0 and below 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "positive"),
        ):  # not-a-number fits nowhere
            if not fits:
                raise UserError(f"optimizer.{name} must be {rule}, not {getattr(self, name)}.")

    def describe(self) -> str:
        """For a reader."""
        if self.hidden_matrices == "adamw":
            return f"AdamW, peak learning rate {self.lr:g}"
        return f"Muon for hidden matrices, peak learning rate {self.muon_lr:g}; AdamW for the rest, {self.lr:g}"

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of the trainable parameters, in groups with and without weight decay.

        ``initial_lr`` of each group is its peak learning rate.
        """
        muon = hidden_matrices(model) if self.hidden_matrices == "muon" else []
        chosen = {id(parameter) for parameter in muon}
        parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [
            group | {"initial_lr": self.lr} for group in groups if group["params"]
        ]  # DeepSpeed takes no empty one
        adamw = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        if not muon:
            return adamw
        matrices = {"params": muon, "weight_decay": self.weight_decay, "momentum": self.muon_momentum}
        return MuonAdamW(matrices | {"lr": self.muon_lr, "initial_lr": self.muon_lr}, adamw)


def hidden_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """The trainable weights of a model's linear layers, without its output's and those that are nearly vectors."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
        and module.weight.requires_grad
        and min(module.weight.shape) >= _SMALLEST_SIDE
        and id(module.weight) not in outside
    ]
