"""Dynamic mask attention as one function, and which backend computes it where."""

import itertools

import torch
import torch.nn.functional as F

from doge.attention.cpu import cpu_attention
from doge.attention.stock import stock_attention
from doge.attention.window import KeyWindow


def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: KeyWindow | int,
    documents: list[int] | None = None,
    order: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal dynamic mask attention over whole sequences, each document seeing only itself.

    Memory is linear in the length, time linear in length times window, with either backend; see `doge.attention`.

    Args:
        query: (batch, heads, seq, head_dim), rotated.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, the `m_j` of each key.
        window: `keep_window_size`, in keys, or more of it; every document has a window of its own.
        documents: lengths in tokens of consecutive documents, over the rows laid end to end (summing to batch * seq),
            none crossing a row's end; `None` where each row is one document.
        order: (batch or 1, seq) int64, each token's place in its row where that does not begin at 0, which tells the
            sinks; with documents it is theirs.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, seq, heads, head_dim), scaled by head_dim ** -0.5, as transformers' attention functions return it.
    """
    if isinstance(window, int):
        window = KeyWindow(window)
    order = order[:, None] if order is not None and documents is None else None  # for every key-value head
    if query.device.type == "cpu" and not dropout_p:
        return cpu_attention(query, key, value, bias, window, documents, order)
    return stock_attention(query, key, value, bias, window, documents, order, dropout_p)


def document_lengths(position_ids: torch.Tensor, batch: int) -> list[int] | None:
    """Lengths of packed documents, over the rows laid end to end; `None` where each row is one document.

    A document starts wherever a position does not follow the one before it (transformers' packing convention).
    Reads the positions back from the device, so call it once per forward.

    Args:
        position_ids: (batch or 1, seq).
    """
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not restarts.any():
        return None
    starts = F.pad(restarts, (1, 0), value=True).expand(batch, -1).flatten().nonzero().flatten()
    bounds = [*starts.tolist(), batch * position_ids.shape[1]]
    return [stop - start for start, stop in itertools.pairwise(bounds)]
