"""AdamW and the warmup-stable-decay learning rate."""

from dataclasses import dataclass
from math import inf

import torch

from doge.common.errors import UserError


@dataclass(frozen=True)
class OptimizerRecipe:
    lr: float = 8e-3
    """Peak learning rate, held through the stable phase."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled decay of every matrix; norms, residual weights and the dynamic mask's ``A`` have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""

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
        """Fused AdamW over the model's parameters in two groups, with and without weight decay."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class SchedulerRecipe:
    """``warmup_stable_decay``: a pure function of the step, so that the stable phase can be left at any checkpoint."""

    warmup_steps: int = 800
    decay_steps: int = 800
    """Length in steps of the linear decay to zero that ends the run."""

    def check(self, max_steps: int) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0 or self.warmup_steps + self.decay_steps > max_steps:
            raise UserError(
                f"lr_scheduler.warmup_steps ({self.warmup_steps}) and lr_scheduler.decay_steps ({self.decay_steps}) "
                f"must not be negative, nor together exceed training.max_steps ({max_steps})."
            )

    def factor(self, step: int, max_steps: int) -> float:
        """What the peak learning rate is multiplied by in ``step`` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= max_steps - self.decay_steps:
            return max(0.0, (max_steps - step) / (self.decay_steps + 1))
        return 1.0

    def is_stable(self, step: int, max_steps: int) -> bool:
        """Whether ``step`` runs at the peak learning rate."""
        return self.warmup_steps <= step < max_steps - self.decay_steps
