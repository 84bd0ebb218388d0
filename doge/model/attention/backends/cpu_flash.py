"""Dynamic mask attention on the CPU, by torch's flash kernel: documents side by side, then chunks of queries.

Memory is linear in the length: beyond the window, a chunk of queries attends to the keys that are still alive when the
chunk begins, gathered, and to its own. The backward pass needs only the inputs, the output and the log-sum-exps. For
torch.compile it is a single operation.
"""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Protocol

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
from doge.model.attention.document_groups import DocumentGroup, group_documents
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
    heads, channels), and the log-sum-exps, (rows, seq, heads, 1). Packed documents make one row of the whole batch."""
    streams, pieces = _prepare(query, key, value, bias, document_ends, order, KeyWindow(window, num_sinks, num_local))
    wide, scale = torch.empty_like(streams[0]), query.shape[-1] ** -0.5
    sums = wide.new_empty((*wide.shape[:-1], 1), dtype=_sums_dtype(wide))
    for piece in pieces:
        mask = piece.mask(query.shape[1])
        found, found_sums = _flash(*_inputs(piece, streams), is_causal=mask is None, attn_mask=mask, scale=scale)
        piece.put(wide, found)
        piece.put(sums, found_sums[..., None])
    output = wide[..., : query.shape[-1]].reshape(query.transpose(1, 2).shape).contiguous()
    if output.data_ptr() == wide.data_ptr():  # with one token of one head: no output may be a view of another
        output = output.clone()
    return output, wide, sums


@_attend.register_fake
def _(query, key, value, bias, document_ends, order, window, num_sinks, num_local):
    batch, heads, seq, head_dim = query.shape
    rows, tokens = (batch, seq) if document_ends is None else (1, batch * seq)
    wide = query.new_empty(rows, tokens, heads, head_dim + num_extra_channels(head_dim))
    sums = query.new_empty(rows, tokens, heads, 1, dtype=_sums_dtype(query))
    return query.new_empty(batch, seq, heads, head_dim), wide, sums


def _sums_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@torch.library.custom_op("doge::cpu_flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, wide: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
    document_ends: Tensor | None, order: Tensor | None, window: int, num_sinks: int, num_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    streams, pieces = _prepare(query, key, value, bias, document_ends, order, KeyWindow(window, num_sinks, num_local))
    batch, heads, seq, head_dim = query.shape
    grad = F.pad(grad, (0, num_extra_channels(head_dim))).view(wide.shape)
    grads = [torch.zeros_like(stream) for stream in streams]
    for piece in pieces:
        mask = piece.mask(heads)
        found = _flash_backward(
            piece.take_grad(grad), *_inputs(piece, streams), piece.take(wide), piece.take(sums)[..., 0], 0.0,
            mask is None, attn_mask=mask, scale=head_dim**-0.5,
        )  # fmt: skip
        piece.put(grads[0], found[0])
        for stream, part in zip(grads[1:], found[1:], strict=True):
            piece.add_to_keys(stream, part.unflatten(1, (stream.shape[2], -1)).sum(2))
    grads = [stream.reshape(batch, seq, -1, stream.shape[-1]).transpose(1, 2) for stream in grads]
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


class _Piece(Protocol):
    """Queries that attend in one call of the flash kernel. Streams are (rows, tokens, heads, channels)."""

    def take(self, stream: Tensor) -> Tensor:
        """What belongs to the queries, (piece's rows, heads, queries, channels)."""

    def take_grad(self, stream: Tensor) -> Tensor:
        """`take`, with zeros for queries that are none."""

    def take_keys(self, stream: Tensor) -> Tensor:
        """What belongs to the keys that the queries may see, (piece's rows, kv_heads, keys, channels)."""

    def mask(self, heads: int) -> Tensor | None:
        """What is added to the scores, (piece's rows, heads, queries, keys); None where only the future is masked."""

    def put(self, stream: Tensor, found: Tensor) -> None:
        """Write what belongs to the queries into ``stream``; the inverse of `take`."""

    def add_to_keys(self, grad: Tensor, found: Tensor) -> None:
        """Add gradients of the keys, or write them where the piece is the first that sees its keys."""


@dataclass(frozen=True)
class _Documents:
    """Documents side by side, each of which sees itself: all of them, or their beginnings."""

    group: DocumentGroup

    def take(self, stream: Tensor) -> Tensor:
        return self.group.take(stream[0])

    def take_grad(self, stream: Tensor) -> Tensor:
        return self.group.take_filled_with_zeros(stream[0])

    take_keys = take

    def mask(self, heads: int) -> None:
        return None

    def put(self, stream: Tensor, found: Tensor) -> None:
        self.group.put(stream[0], found)

    add_to_keys = put


@dataclass(frozen=True)
class _Queries:
    """Queries [start, stop) of every row, and the earlier keys that they may see.

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

    def take(self, stream: Tensor) -> Tensor:
        return stream[:, self.start : self.stop].transpose(1, 2)

    take_grad = take

    def take_keys(self, stream: Tensor) -> Tensor:
        if self.left is None:
            return self.take(stream)
        return torch.cat([take_keys(stream.transpose(1, 2), self.left), self.take(stream)], dim=2)

    def mask(self, heads: int) -> Tensor | None:
        if self.expiry is None:
            return None
        queries = torch.arange(self.start, self.stop)[:, None]
        mask = torch.where(queries < self.expiry[:, :, None], 0.0, -torch.inf)
        mask[..., self.start - self.stop :].masked_fill_(queries < queries.T, -torch.inf)
        return mask.repeat_interleave(heads // mask.shape[1], dim=1)

    def put(self, stream: Tensor, found: Tensor) -> None:
        self.take(stream).copy_(found)

    def add_to_keys(self, grad: Tensor, found: Tensor) -> None:
        number = self.stop - self.start
        self.take(grad).add_(found[:, :, -number:])
        if self.left is not None:
            earlier = found[:, :, :-number]
            grad.transpose(1, 2).scatter_add_(2, self.left[..., None].expand_as(earlier), earlier)


def _inputs(piece: _Piece, streams: list[Tensor]) -> Iterator[Tensor]:
    """The piece's queries, and its keys and values repeated for every query head."""
    query, *others = streams
    yield piece.take(query)
    for stream in others:
        found = piece.take_keys(stream)
        yield found[:, :, None].expand(-1, -1, query.shape[2] // found.shape[1], -1, -1).flatten(1, 2)


def _prepare(query, key, value, bias, document_ends, order, window) -> tuple[list[Tensor], list[_Piece]]:
    """The inputs with the bias folded in, (rows, tokens, heads, channels), and the pieces that attend together. Packed
    documents make one row of the whole batch."""
    query, key, value, by_token = (states.transpose(1, 2) for states in (query, key, value, bias))
    streams = [x.contiguous() for x in (extend_query(query), fold_bias(key, by_token), pad_channels(value))]
    if document_ends is None:
        seq = query.shape[1]
        whole = _Queries(0, min(seq, window.size))
        return streams, [whole, *_beyond_window(bias, 0, seq, window, order)]
    lengths = document_lengths(document_ends)
    ends = list(itertools.accumulate(lengths))
    begins = [0, *ends[:-1]]
    beginnings = tuple(min(length, window.size) for length in lengths)
    groups = group_documents(tuple(begins), beginnings, query.shape[2], torch.get_num_threads())
    row = by_token.flatten(0, 1).T[None]
    later = (_beyond_window(row, begin, end, window, None) for begin, end in zip(begins, ends, strict=True))
    return [x.flatten(0, 1)[None] for x in streams], [*map(_Documents, groups), *itertools.chain(*later)]


def _beyond_window(bias: Tensor, begin: int, end: int, window: KeyWindow, order: Tensor | None) -> Iterator[_Queries]:
    """Cut what a document has beyond its window into chunks of queries. The bias is (rows, kv_heads, tokens)."""
    if end - begin <= window.size:
        return
    expiry = key_expiry(bias[..., begin:end], window, order)
    for start in range(begin + window.size, end, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, end)
        left = survivors(expiry, start - begin, window.size)
        lives = torch.cat([take_keys(expiry, left), expiry[..., start - begin : stop - begin]], dim=-1)
        yield _Queries(start, stop, left + begin, lives + begin)
