"""The learning rate's schedule: a pure function of the step."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from doge.common.errors import UserError


@dataclass(frozen=True)
class SchedulerRecipe:
    """``warmup_stable_decay``: a pure function of the step, so that any checkpoint can leave the stable phase."""

    warmup_steps: int = 800
    """Steps of the linear warm-up that begins the run."""
    decay_steps: int = 800
    """Steps of the decay to zero that ends the run."""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """How the rate falls in the decay. ``1-sqrt`` falls fast at first and is low for longer: 1 minus the square root of
    the part of the decay that is over (Hägele et al. 2024, arXiv:2405.18392)."""

    def check(self, max_steps: int) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0 or self.warmup_steps + self.decay_steps > max_steps:
            raise UserError(
                f"lr_scheduler.warmup_steps ({self.warmup_steps}) and lr_scheduler.decay_steps ({self.decay_steps}) "
                f"must not be negative, nor together exceed training.max_steps ({max_steps})."
            )

    def describe(self) -> str:
        """For a reader."""
        shape = "" if self.decay_shape == "linear" else f" ({self.decay_shape})"
        return f"{self.warmup_steps:,} steps of warm-up, {self.decay_steps:,} of decay to zero{shape}"

    def factor(self, step: int, max_steps: int) -> float:
        """Factor of the peak learning rate in ``step`` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= max_steps - self.decay_steps:
            left = max(0.0, (max_steps - step) / (self.decay_steps + 1))
            return left if self.decay_shape == "linear" else 1 - sqrt(1 - left)
        return 1.0

    def is_stable(self, step: int, max_steps: int) -> bool:
        """Whether ``step`` runs at the peak learning rate."""
        return self.warmup_steps <= step < max_steps - self.decay_steps
