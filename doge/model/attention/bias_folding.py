"""Folding a key's bias into further channels, so that ordinary causal attention adds it to the scores."""

import torch
import torch.nn.functional as F

# The number by which a query multiplies the bias channels of keys: float16 ends at 65,504, and a bias, which may be
# e^10 and more (see `key_bias`), is multiplied by the square root of head_dim. A power of two rounds nothing.
QUERY_CHANNEL = 16.0


def fold_bias(key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Append the bias to the key as channels: (..., head_dim) -> (..., head_dim + 2, rounded up to a multiple of 8).

    The bias, at most `largest_bias`, is multiplied by `channel_scale` and stored as the sum of two numbers of the key's
    dtype, so that bfloat16 keeps 16 bits of it.

    Args:
        key: (..., head_dim).
        bias: (...), float32.
    """
    largest = largest_bias(key.dtype, key.shape[-1])
    bias = (bias.clamp(-largest, largest) * channel_scale(key.shape[-1])).unsqueeze(-1)
    high = bias.to(key.dtype)
    low = (bias - high).detach().to(key.dtype)  # all of the gradient goes through `high`
    padding = key.new_zeros(()).expand(*key.shape[:-1], num_extra_channels(key.shape[-1]) - 2)
    return torch.cat([key, high, low, padding], dim=-1)


def extend_query(query: torch.Tensor) -> torch.Tensor:
    """Append to the query a constant for each of the two bias channels of a folded key, and zeros for the padding."""
    extra = query.new_zeros(num_extra_channels(query.shape[-1]))
    extra[:2] = QUERY_CHANNEL
    return torch.cat([query, extra.expand(*query.shape[:-1], -1)], dim=-1)


def pad_channels(states: torch.Tensor) -> torch.Tensor:
    """Pad the value with zeros to the width of a folded key: flash attention needs equal widths."""
    return F.pad(states, (0, num_extra_channels(states.shape[-1])))


def channel_scale(head_dim: int) -> float:
    """What a bias is multiplied by in its channel of the key: attention divides scores by sqrt(head_dim)."""
    return head_dim**0.5 / QUERY_CHANNEL


def largest_bias(dtype: torch.dtype, head_dim: int) -> float:
    """The largest magnitude of a folded bias, which keeps scores finite: 46,000 in float16 with head_dim 128."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max / QUERY_CHANNEL) / 2 / channel_scale(head_dim)


def num_extra_channels(head_dim: int) -> int:
    """Two channels for the bias, plus padding to a multiple of 8, which fused attention kernels require."""
    return 2 + (-head_dim - 2) % 8
