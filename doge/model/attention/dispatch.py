"""Dynamic mask attention as one function, which chooses its backend: Triton, the CPU's flash kernel, or SDPA."""

import functools
import logging

import torch
import torch.nn.functional as F

from doge.model.attention.backends.cpu_flash import cpu_flash_attention
from doge.model.attention.backends.torch_sdpa import sdpa_attention
from doge.model.attention.backends.triton_attention import triton_attention, unsupported_reason
from doge.model.attention.gathered_chunks import attend_gathered_chunks
from doge.model.attention.window import KeyWindow, lifetimes

# The kernels visit a block of keys until all of its keys have expired, which is nearly half of the sequence per query.
# In sequences longer than this many chunks, gathering the live keys is cheaper, although it wastes as many queries.
GATHER_FROM_CHUNKS = 4
QUERY_CHUNK = 1024  # queries of a chunk at least, so that a chunk fills a GPU

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
    """Causal dynamic mask attention over whole sequences, where each document sees only itself.

    With every backend, memory is linear in the length and time in length times window; see `doge.model.attention`.

    Args:
        query: (batch, heads, seq, head_dim), rotated.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, the `m_j` of each key.
        window: The `keep_window_size` in keys, or a whole `KeyWindow`; every document has a window of its own.
        document_ends: (batch, seq) int64, where in its row each token's document ends; `None` if each row is one
            document.
        order: (batch or 1, seq) int64, each token's place in its row, which tells the sinks; by default 0, 1, 2, ...
            Ignored with ``document_ends``, where a place is that in the document.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (batch, seq, heads, head_dim), scaled by head_dim ** -0.5, as transformers' attention functions return it.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms in float32
    if isinstance(window, int):
        window = KeyWindow(window)
    order = order[:, None] if order is not None and document_ends is None else None  # for every key-value head
    if query.device.type == "cuda" and not dropout_p and _kernels_support(query.device, query.dtype, query.shape[-1]):
        return _attend_by_kernels(query, key, value, bias, lifetimes(bias, window, document_ends, order), window.size)
    if query.device.type == "cpu" and not dropout_p:
        return cpu_flash_attention(query, key, value, bias, window, document_ends, order)
    return sdpa_attention(query, key, value, bias, window, document_ends, order, dropout_p)


@torch.compiler.assume_constant_result  # a compiled layer asks once, and the question leaves nothing in its graph
def _kernels_support(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("The attention kernels cannot run here (%s): PyTorch computes the same results, more slowly.", reason)


@torch.compiler.disable  # it would trace the kernels' autograd.Function
def _attend_by_kernels(query, key, value, bias, expiry, window: int) -> torch.Tensor:
    chunk = max(window, QUERY_CHUNK)
    if expiry is None or query.shape[2] <= GATHER_FROM_CHUNKS * chunk:
        return triton_attention(query, key, value, bias, expiry)
    return attend_gathered_chunks(triton_attention, query, key, value, bias, expiry, window, chunk)


def document_ends(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Where in its row each token's document ends, (batch, seq) int64; `None` if each row is one document.

    A document starts wherever a position does not follow the one before it (transformers' packing convention). The
    answer is read back from the device, so call this once per forward.

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
