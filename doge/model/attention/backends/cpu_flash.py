"""Dynamic mask attention on the CPU, by torch's flash kernel: one document, or one chunk of queries, at a time.

Memory is linear in the length: beyond the window, a chunk of queries attends to the keys that are still alive when the
chunk begins, gathered, and to its own. The backward pass needs only the inputs, the output and the log-sum-exps. For
torch.compile it is a single operation.
"""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doge.model.attention.backends.registry import register
from doge.model.attention.bias_folding import (
    channel_scale,
    extend_query,
    fold_bias,
    largest_bias,
    num_extra_channels,
    pad_channels,
)
from doge.model.attention.documents import document_lengths
from doge.model.attention.window import KeyWindow, key_expiry, survivors, take_keys

QUERY_CHUNK = 256  # queries beyond the window that attend together, to at most window + QUERY_CHUNK keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@register
class CpuFlash:
    """Differentiable once."""

    name = "cpu_flash"
    device_types = ("cpu",)
    priority = 1

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str | None:
        return "it has no dropout" if dropout else None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
        window: KeyWindow, document_ends: Tensor | None, order: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        return _attend(query, key, value, bias, document_ends, order, *astuple(window))[0]


@torch.library.custom_op("doge::cpu_flash_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, document_ends: Tensor | None, order: Tensor | None,
    window: int, num_sinks: int, num_local: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output (batch, seq, heads, head_dim), and for the backward pass the output with all channels, (rows, seq,
    heads, channels), and the log-sum-exps, (rows, heads, seq). Packed documents make one row of the whole batch."""
    streams, pieces = _prepare(query, key, value, bias, document_ends, order, KeyWindow(window, num_sinks, num_local))
    heads, scale = query.shape[1], query.shape[-1] ** -0.5
    found = [_flash(*piece.inputs(*streams), scale=scale, **piece.options(heads)) for piece in pieces]
    wide = torch.cat([output.transpose(1, 2) for output, _ in found], dim=1)
    output = wide[..., : query.shape[-1]].reshape(query.transpose(1, 2).shape).contiguous()
    if output.data_ptr() == wide.data_ptr():  # with one token of one head: no output may be a view of another
        output = output.clone()
    return output, wide, torch.cat([sums for _, sums in found], dim=2)


@_attend.register_fake
def _(query, key, value, bias, document_ends, order, window, num_sinks, num_local):
    batch, heads, seq, head_dim = query.shape
    rows, tokens = (batch, seq) if document_ends is None else (1, batch * seq)
    wide = query.new_empty(rows, tokens, heads, head_dim + num_extra_channels(head_dim))
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(batch, seq, heads, head_dim), wide, query.new_empty(rows, heads, tokens, dtype=sums)


@torch.library.custom_op("doge::cpu_flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, wide: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
    document_ends: Tensor | None, order: Tensor | None, window: int, num_sinks: int, num_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    streams, pieces = _prepare(query, key, value, bias, document_ends, order, KeyWindow(window, num_sinks, num_local))
    batch, heads, seq, head_dim = query.shape
    grad = F.pad(grad, (0, num_extra_channels(head_dim))).view(wide.shape).transpose(1, 2)
    grads = [torch.zeros_like(stream.transpose(1, 2)).transpose(1, 2) for stream in streams]
    wide = wide.transpose(1, 2)
    for piece in pieces:
        own = slice(piece.start, piece.stop)
        options = piece.options(heads)
        found = _flash_backward(
            grad[:, :, own], *piece.inputs(*streams), wide[:, :, own], sums[:, :, own], 0.0, options["is_causal"],
            attn_mask=options["attn_mask"], scale=head_dim**-0.5,
        )  # fmt: skip
        piece.add(grads, found)
    grads = [stream.transpose(1, 2).reshape(batch, seq, -1, stream.shape[-1]).transpose(1, 2) for stream in grads]
    grad_bias = (grads[1][..., head_dim].float() * channel_scale(head_dim)).to(bias.dtype)
    grad_bias = grad_bias.masked_fill(bias.abs() > largest_bias(key.dtype, head_dim), 0.0)
    grad_query, grad_key, grad_value = (stream[..., :head_dim].contiguous() for stream in grads)
    return grad_query, grad_key, grad_value, grad_bias.contiguous()


@_backward.register_fake
def _(grad, wide, sums, query, key, value, bias, *_):
    return tuple(states.new_empty(states.shape) for states in (query, key, value, bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.num_sinks, ctx.num_local = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx, grad, *_):
    grads = _backward(grad, *ctx.saved_tensors, ctx.window, ctx.num_sinks, ctx.num_local)
    return (*grads, None, None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


@dataclass(frozen=True)
class _Piece:
    """Queries [start, stop) that attend together, and the earlier keys that they may see.

    Args:
        left: (rows, kv_heads, window) int64, indices of the keys that are still alive when the piece begins; None where
            the piece is the first of its document.
        expiry: (rows, kv_heads, window + stop - start), the first query that no longer sees each of those keys and of
            the piece's own; None with ``left``.
    """

    start: int
    stop: int
    left: Tensor | None = None
    expiry: Tensor | None = None

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """The piece's queries, and its keys and values repeated for every query head."""
        yield query[:, :, self.start : self.stop]
        for states in (key, value):
            found = states[:, :, self.start : self.stop]
            if self.left is not None:
                found = torch.cat([take_keys(states, self.left), found], dim=2)
            groups = query.shape[1] // found.shape[1]
            yield found[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)

    def options(self, heads: int) -> dict[str, Any]:
        """The masking arguments of the flash kernel."""
        if self.expiry is None:
            return {"is_causal": True, "attn_mask": None}
        queries = torch.arange(self.start, self.stop)[:, None]
        mask = torch.where(queries < self.expiry[:, :, None], 0.0, -torch.inf)
        mask[..., self.start - self.stop :].masked_fill_(queries < queries.T, -torch.inf)
        return {"is_causal": False, "attn_mask": mask.repeat_interleave(heads // mask.shape[1], dim=1)}

    def add(self, grads: list[Tensor], found: tuple[Tensor, ...]) -> None:
        """Add the piece's gradients ``found`` to the gradients of query, key and value."""
        grads[0][:, :, self.start : self.stop] = found[0]
        number = self.stop - self.start
        for grad, part in zip(grads[1:], found[1:], strict=True):
            part = part.unflatten(1, (grad.shape[1], -1)).sum(2)
            grad[:, :, self.start : self.stop] += part[:, :, -number:]
            if self.left is not None:
                grad.scatter_add_(2, self.left[..., None].expand_as(part[:, :, :-number]), part[:, :, :-number])


def _prepare(query, key, value, bias, document_ends, order, window) -> tuple[list[Tensor], list[_Piece]]:
    """The inputs with the bias folded in, (rows, heads, seq, channels) with tokens outermost in memory, and the pieces
    that attend together. Packed documents make one row of the whole batch."""
    seq = query.shape[2]
    documents = [seq]
    streams = [extend_query(query), fold_bias(key, bias), pad_channels(value)]
    if document_ends is not None:
        documents = document_lengths(document_ends)
        streams = [_end_to_end(stream) for stream in streams]
        bias = _end_to_end(bias[..., None])[..., 0]
    streams = [stream.transpose(1, 2).contiguous().transpose(1, 2) for stream in streams]
    return streams, list(_pieces(bias, window, documents, order))


def _pieces(bias: Tensor, window: KeyWindow, documents: list[int], order: Tensor | None) -> Iterator[_Piece]:
    """Cut documents into pieces that attend together: as many queries as the window has keys, then chunks."""
    ends = list(itertools.accumulate(documents))
    for begin, end in zip([0, *ends], ends, strict=False):
        full = min(end, begin + window.size)
        yield _Piece(begin, full)
        if full == end:
            continue
        expiry = key_expiry(bias[..., begin:end], window, order)
        for start in range(full, end, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, end)
            left = survivors(expiry, start - begin, window.size)
            lives = torch.cat([take_keys(expiry, left), expiry[..., start - begin : stop - begin]], dim=-1)
            yield _Piece(start, stop, left + begin, lives + begin)


def _end_to_end(stream: Tensor) -> Tensor:
    """Concatenate the rows of a batch: (batch, heads, seq, channels) -> (1, heads, batch * seq, channels)."""
    return stream.transpose(1, 2).reshape(1, -1, stream.shape[1], stream.shape[3]).transpose(1, 2)
