"""What comes of a step."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the weight of the global batch, in nats."""
    grad_norm: float
    weight: float
    """What the mean is over, such as loss tokens."""
    flops: float = 0.0
    """Floating-point operations of the global batch, by the objective; 0 where unknown."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's further sums over the weight, by name."""
    gathered: list[list[float]] = field(default_factory=list)
    """The numbers that every rank gave, by rank; the same on all of them."""
    micro_batch_limit: int | None = None
    """The most units that a micro-batch of this rank may have from now on, where the step found that out."""
    compute_seconds: float = 0.0
    """This rank's own forward and backward passes, without waiting and without an attempt that ran out of memory.

    Under ZeRO 3 on a GPU it is an upper bound, for the gathers run beside it on streams of their own.
    """
    wait_seconds: float = 0.0
    """In collectives: waiting for other ranks, and the communication itself."""


class StepRefused(Exception):
    """A step's loss or gradient is no number, or the loss beyond its bound. Nothing was updated; all ranks raise it.

    Args:
        max_loss: the bound.
    """

    def __init__(self, loss: float, grad_norm: float, max_loss: float = math.inf):
        self.is_spike = math.isfinite(loss) and math.isfinite(grad_norm)
        beyond = f", beyond the bound of {max_loss:.4g}" if self.is_spike else ""
        super().__init__(f"the loss was {loss:.4g}{beyond} and the gradient norm {grad_norm:.4g}")
        self.loss, self.grad_norm = loss, grad_norm
