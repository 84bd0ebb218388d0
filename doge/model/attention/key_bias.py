"""The bias of each key, which is computed from its value."""

import torch
import torch.nn.functional as F

LARGEST_EXPONENT = 10.0  # of a bias that is an exponential: e^10 is 22,026; `cpu_step.cpp` has the same number


def key_bias(A: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """`m = exp(A * softplus(steps))`, continued by its tangent where the exponent is above `LARGEST_EXPONENT`.

    So it never overflows, and neither does its gradient: a key that is 22,026 above the others already has all of the
    attention, and the rounding errors of the scores' gradients, multiplied by an ever larger m, would be noise without
    bound. The tangent keeps the order of keys, and has the slope of the exponential at the point where it begins.

    Args:
        A: (kv_heads,).
        steps: (..., kv_heads), the outputs of `dt_proj`.

    Returns:
        (..., kv_heads) float32: rounding the exponent to bfloat16 would move the bias, and with it the order of keys.
    """
    exponent = A.float() * F.softplus(steps.float())
    within = exponent.clamp(max=LARGEST_EXPONENT)
    return torch.exp(within) * (1 + (exponent - within))  # below, the second factor is exactly 1
