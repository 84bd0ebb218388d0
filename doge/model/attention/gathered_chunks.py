"""Attention in time linear in the length, by a kernel that skips no key in the midst of others that live."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from doge.model.attention.window import survivors, take_keys


def attend_in_chunks(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    expiry: Tensor,
    window: int,
    chunk: int,
) -> Tensor:
    """``attend(query, key, value, bias, expiry)``, see `triton_attention`, by chunks of queries.

    A chunk meets the at most ``window`` keys that its first query may still see, gathered, and its own. As many queries
    of zeros stand before its own; what they find is dropped.

    Args:
        chunk: queries of a chunk, no fewer than ``window``.
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
        lives = (lives - start).clamp(min=0) + window  # those that are gone end before the first query that counts
        outputs.append(attend(F.pad(own[0], (0, 0, window, 0)), *inputs, lives)[:, window:])
    return torch.cat(outputs, dim=1)
