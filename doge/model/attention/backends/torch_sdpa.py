"""Dynamic mask attention by torch's `scaled_dot_product_attention`, on any device and with dropout."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from doge.model.attention.bias_folding import extend_query, fold_bias, pad_channels
from doge.model.attention.window import KeyWindow, key_expiry, survivors, take_keys

QUERY_CHUNK = 512  # queries beyond the window that are masked at a time: a mask has QUERY_CHUNK x keys elements


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    window: KeyWindow,
    document_ends: torch.Tensor | None,
    order: torch.Tensor | None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`dynamic_mask_attention` by PyTorch alone."""
    batch, heads, seq, head_dim = query.shape
    options = {"scale": head_dim**-0.5, "dropout_p": dropout_p, "enable_gqa": heads != key.shape[1]}
    streams = (extend_query(query), fold_bias(key, bias), pad_channels(value), bias.detach()[..., None])
    if document_ends is None:
        output = _attend(*streams, window, order, options)
    else:
        documents = document_lengths(document_ends)
        # Token-major, (1, batch * seq, heads, channels): one split and one concatenation, whose backward is as cheap.
        streams = [x.transpose(1, 2).reshape(1, batch * seq, x.shape[1], -1) for x in streams]
        streams = [stream.transpose(1, 2).split(documents, dim=2) for stream in streams]
        output = torch.cat([_attend(*parts, window, None, options) for parts in zip(*streams, strict=True)], dim=1)
    return output.reshape(batch, seq, heads, -1)[..., :head_dim]


def document_lengths(document_ends: torch.Tensor) -> list[int]:
    """Lengths of all rows' documents in order; reads them back from the device."""
    batch, seq = document_ends.shape
    rows = torch.arange(batch, device=document_ends.device)[:, None] * seq
    return (document_ends + rows).flatten().unique_consecutive(return_counts=True)[1].tolist()


def _attend(query, key, value, bias, window, order, options) -> torch.Tensor:
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


def _attend_interval(query, key, value, expiry, first, window, options):
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
