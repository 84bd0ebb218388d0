"""The bias of a key as a further channel of it, matched by a 1 in the query: stock causal attention adds it then."""

import torch
import torch.nn.functional as F


def fold_bias(key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The key with its bias in further channels: (..., head_dim) -> (..., head_dim + 2, rounded up to 8).

    The bias is held as the sum of two numbers of the key's dtype, so that bfloat16 keeps 16 bits of it, and times
    sqrt(head_dim), by which attention divides again.
    """
    largest = torch.finfo(key.dtype).max / 2  # below infinity with any product of query and key: float16 ends at 65,504
    bias = (bias * key.shape[-1] ** 0.5).clamp(-largest, largest).unsqueeze(-1)
    high = bias.to(key.dtype)
    low = (bias - high).detach().to(key.dtype)  # all of the gradient goes through `high`
    padding = key.new_zeros(()).expand(*key.shape[:-1], num_extra_channels(key.shape[-1]) - 2)
    return torch.cat([key, high, low, padding], dim=-1)


def extend_query(query: torch.Tensor) -> torch.Tensor:
    """The query with ones against the two bias channels of a folded key, zeros against the rest."""
    extra = query.new_zeros(num_extra_channels(query.shape[-1]))
    extra[:2] = 1
    return torch.cat([query, extra.expand(*query.shape[:-1], -1)], dim=-1)


def pad_channels(states: torch.Tensor) -> torch.Tensor:
    """The value with zeros up to the width of a folded key: flash attention wants equal widths."""
    return F.pad(states, (0, num_extra_channels(states.shape[-1])))


def num_extra_channels(head_dim: int) -> int:
    """Two for the bias, and as many as bring the width to a multiple of 8, which fused attention kernels ask for."""
    return 2 + (-head_dim - 2) % 8
