"""Folding a key's bias into further channels, so that ordinary causal attention adds it to the scores."""

import torch
import torch.nn.functional as F


def fold_bias(key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Append the bias to the key as channels: (..., head_dim) -> (..., head_dim + 2, rounded up to a multiple of 8).

    The bias is stored as the sum of two numbers of the key's dtype, so that bfloat16 keeps 16 bits of it, and is
    multiplied by sqrt(head_dim), because attention divides scores by that.

    Args:
        key: (..., head_dim).
        bias: (...), float32.
    """
    largest = torch.finfo(key.dtype).max / 2  # below infinity with any product of query and key: float16 ends at 65,504
    bias = (bias * key.shape[-1] ** 0.5).clamp(-largest, largest).unsqueeze(-1)
    high = bias.to(key.dtype)
    low = (bias - high).detach().to(key.dtype)  # all of the gradient goes through `high`
    padding = key.new_zeros(()).expand(*key.shape[:-1], num_extra_channels(key.shape[-1]) - 2)
    return torch.cat([key, high, low, padding], dim=-1)


def extend_query(query: torch.Tensor) -> torch.Tensor:
    """Append to the query a 1 for each of the two bias channels of a folded key, and zeros for the padding."""
    extra = query.new_zeros(num_extra_channels(query.shape[-1]))
    extra[:2] = 1
    return torch.cat([query, extra.expand(*query.shape[:-1], -1)], dim=-1)


def pad_channels(states: torch.Tensor) -> torch.Tensor:
    """Pad the value with zeros to the width of a folded key: flash attention needs equal widths."""
    return F.pad(states, (0, num_extra_channels(states.shape[-1])))


def num_extra_channels(head_dim: int) -> int:
    """Two channels for the bias, plus padding to a multiple of 8, which fused attention kernels require."""
    return 2 + (-head_dim - 2) % 8
