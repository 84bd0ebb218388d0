"""Dynamic mask attention as one function, which the fastest backend for its device, dtype and width computes."""

import torch

from doge.model.attention.backends.registry import choose_backend
from doge.model.attention.window import KeyWindow


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
    backend = choose_backend(query.device, query.dtype, query.shape[-1], dropout_p > 0)
    return backend.attend(query, key, value, bias, window, document_ends, order, dropout_p)
