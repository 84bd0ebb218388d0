"""Dynamic mask attention as one function, and which backend computes it where."""

import functools
import logging

import torch
import torch.nn.functional as F

from doge.model.attention.cpu_flash import cpu_attention
from doge.model.attention.gathered_chunks import attend_in_chunks
from doge.model.attention.torch_sdpa import stock_attention
from doge.model.attention.triton_attention import refusal, triton_attention
from doge.model.attention.window import KeyWindow, lifetimes

# Times a chunk: the kernels visit a block of keys until all of them have expired, which is half of the sequence a
# query, or nearly. From here on the gathered keys, with as many queries for nothing, are fewer.
FAR = 4
QUERY_CHUNK = 1024  # of their queries at least, so that a chunk fills a GPU

_log = logging.getLogger(__name__)


def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: KeyWindow | int,
    document_ends: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal dynamic mask attention over whole sequences, each document seeing only itself.

    Memory is linear in the length, time linear in length times window, with every backend; see `doge.model.attention`.

    Args:
        query: (batch, heads, seq, head_dim), rotated.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, the `m_j` of each key.
        window: `keep_window_size`, in keys, or more of it; every document has a window of its own.
        document_ends: (batch, seq) int64, where in its row each token's document ends; `None` where each row is one
            document.
        order: (batch or 1, seq) int64, each token's place in its row where that does not begin at 0, which tells the
            sinks; with documents it is theirs.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, seq, heads, head_dim), scaled by head_dim ** -0.5, as transformers' attention functions return it.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms in float32
    if isinstance(window, int):
        window = KeyWindow(window)
    order = order[:, None] if order is not None and document_ends is None else None  # for every key-value head
    if query.device.type == "cuda" and not dropout_p and _kernels_take(query.device, query.dtype, query.shape[-1]):
        return _by_kernels(query, key, value, bias, lifetimes(bias, window, document_ends, order), window.size)
    if query.device.type == "cpu" and not dropout_p:
        return cpu_attention(query, key, value, bias, window, document_ends, order)
    return stock_attention(query, key, value, bias, window, document_ends, order, dropout_p)


@torch.compiler.assume_constant_result  # a compiled layer asks once, and its graph holds nothing of the question
def _kernels_take(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    reason = refusal(device, dtype, head_dim)
    if reason is not None:
        _say(reason)
    return reason is None


@functools.cache
def _say(reason: str) -> None:
    _log.warning("The attention kernels cannot run here (%s): PyTorch computes the same more slowly.", reason)


@torch.compiler.disable  # it would trace the kernels' autograd.Function
def _by_kernels(query, key, value, bias, expiry, window: int) -> torch.Tensor:
    chunk = max(window, QUERY_CHUNK)
    if expiry is None or query.shape[2] <= FAR * chunk:
        return triton_attention(query, key, value, bias, expiry)
    return attend_in_chunks(triton_attention, query, key, value, bias, expiry, window, chunk)


def document_ends(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Where in its row each token's document ends, (batch, seq) int64; `None` where each row is one document.

    A document starts wherever a position does not follow the one before it (transformers' packing convention).
    Asks the device whether any does, so call it once per forward.

    Args:
        position_ids: (batch or 1, seq).
    """
    seq = position_ids.shape[1]
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not restarts.any():
        return None
    starts = torch.arange(1, seq, device=position_ids.device).where(restarts, seq)
    ends = F.pad(starts, (0, 1), value=seq).flip(-1).cummin(-1).values.flip(-1)
    return ends.expand(batch, -1)
