"""Dynamic mask attention by torch's `scaled_dot_product_attention`, on any device and with dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from doge.model.attention.backends.registry import register
from doge.model.attention.bias_folding import extend_query, fold_bias, pad_channels
from doge.model.attention.documents import document_lengths
from doge.model.attention.window import KeyWindow, key_expiry, survivors, take_keys

QUERY_CHUNK = 512  # queries beyond the window that are masked at a time: a mask has QUERY_CHUNK x keys elements


@register
class TorchSdpa:
    """Computes every call."""

    name = "torch_sdpa"
    device_types = None
    priority = 0

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str | None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
        window: KeyWindow, document_ends: Tensor | None, order: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        batch, heads, seq, head_dim = query.shape
        options = {"scale": head_dim**-0.5, "dropout_p": dropout_p, "enable_gqa": heads != key.shape[1]}
        streams = (extend_query(query), fold_bias(key, bias), pad_channels(value), bias.detach()[..., None])
        if document_ends is None:
            output = _attend(window, order, options, *streams)
        else:
            lengths = document_lengths(document_ends)
            # Tokens outermost, (1, batch * seq, heads, channels): one split, whose backward is one concatenation.
            rows = [x.transpose(1, 2).reshape(1, batch * seq, x.shape[1], -1) for x in streams]
            documents = zip(*(row.transpose(1, 2).split(lengths, dim=2) for row in rows), strict=True)
            output = torch.cat([_attend(window, None, options, *document) for document in documents], dim=1)
        return output.reshape(batch, seq, heads, -1)[..., :head_dim]


def _attend(
    window: KeyWindow, order: Tensor | None, options: dict[str, Any],
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    """Attention within one document per row: (batch, seq, heads, channels)."""
    seq = query.shape[2]
    if seq <= window.size:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options).transpose(1, 2)
    expiry = key_expiry(bias[..., 0], window, order)
    chunks = []
    for start in range(0, seq, QUERY_CHUNK):
        inputs = (query[:, :, start : start + QUERY_CHUNK], key, value, expiry, start, window.size, options)
        if torch.is_grad_enabled():  # recomputed, or every chunk's mask would be kept for the backward pass
            chunks.append(checkpoint(_attend_interval, *inputs, use_reentrant=False))
        else:
            chunks.append(_attend_interval(*inputs))
    return torch.cat(chunks, dim=2).transpose(1, 2)


def _attend_interval(
    query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, first: int, window: int, options: dict[str, Any]
) -> Tensor:
    """Attention of queries `first`, `first + 1`, ... to the keys with `j <= i < expiry_j`."""
    stop = first + query.shape[2]
    j = torch.arange(stop, device=query.device).expand(*expiry.shape[:2], -1)
    if first > window:
        j = torch.cat([survivors(expiry, first, window), j[..., first:]], dim=-1)
    i = torch.arange(first, stop, device=query.device)[:, None]
    visible = (j[:, :, None] <= i) & (i < take_keys(expiry, j)[:, :, None])
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
    key, value = take_keys(key, j), take_keys(value, j)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, **options)
