"""The optimizer: fused AdamW, with weight decay on matrices only."""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from doge.common.errors import UserError


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

    def __post_init__(self):
        for name, fits, rule in (
            ("lr", 0 < self.lr < inf, "positive and finite"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1"),
            ("eps", 0 < self.eps < inf, "positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, "finite and not negative"),
            ("max_grad_norm", self.max_grad_norm > 0, "positive"),
        ):  # not-a-number fits nowhere
            if not fits:
                raise UserError(f"optimizer.{name} must be {rule}, not {getattr(self, name)}.")

    def build(self, model: torch.nn.Module) -> torch.optim.AdamW:
        """Build fused AdamW over the trainable parameters, in two groups with and without weight decay."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # DeepSpeed takes no empty one
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
