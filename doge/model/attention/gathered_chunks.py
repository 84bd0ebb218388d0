"""Attention in time linear in the length, by a kernel that cannot skip expired keys between live ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from doge.model.attention.window import survivors, take_keys


def attend_gathered_chunks(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    expiry: Tensor,
    window: int,
    chunk: int,
) -> Tensor:
    """Compute ``attend(query, key, value, bias, expiry)`` one chunk of queries at a time.

    A chunk attends to the keys, at most ``window``, that its first query may still see, gathered, and to its own. Its
    queries are preceded by ``window`` queries of zeros, whose outputs are dropped.

    Args:
        attend: A function with the arguments and the result of `triton_attention`.
        window: Keys that a query sees at most.
        chunk: Queries of a chunk, no fewer than ``window``.

    Returns:
        (batch, seq, heads, head_dim).
    """
    outputs = []
    for start in range(0, query.shape[2], chunk):
        own = [states[:, :, start : start + chunk] for states in (query, key, value, bias, expiry)]
        if start == 0:
            outputs.append(attend(*own))
            continue
        left = survivors(expiry, start, window)
        before = [take_keys(states, left) for states in (key, value, bias, expiry)]
        *inputs, lives = (torch.cat(pair, dim=2) for pair in zip(before, own[1:], strict=True))
        lives = (lives - start).clamp(min=0) + window  # expired keys end before the first real query
        outputs.append(attend(F.pad(own[0], (0, 0, window, 0)), *inputs, lives)[:, window:])
    return torch.cat(outputs, dim=1)
