"""Dynamic mask attention on the CPU: torch's flash kernel, a document at a time, a chunk of queries at a time.

Nothing that is as long as a sequence is wide is ever made: beyond the window a chunk of queries meets the keys that
were left before it, gathered, and its own. For the backward pass the inputs, the outputs and the log-sum-exps are kept.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from doge.attention.folding import extend_query, fold_bias, num_extra_channels, pad_channels
from doge.attention.window import KeyWindow, key_expiry

QUERY_CHUNK = 256  # queries beyond the window that attend together: to no more than window + QUERY_CHUNK keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    window: KeyWindow,
    documents: list[int] | None,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """See `dynamic_mask_attention`; differentiable once."""
    return _CpuAttention.apply(query, key, value, bias, window, documents, order)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, window, documents, order):
        batch, heads, seq, head_dim = query.shape
        streams = (extend_query(query), fold_bias(key, bias), pad_channels(value))
        if documents is None:
            documents = [seq]
        else:
            streams = tuple(_end_to_end(stream) for stream in streams)
            bias = _end_to_end(bias[..., None])[..., 0]
        ctx.pieces = list(_pieces(bias, window, documents, order))
        ctx.kv_heads, ctx.scale, ctx.shape = key.shape[1], head_dim**-0.5, (batch, seq, heads, head_dim)
        outputs, sums = [], []
        for piece in ctx.pieces:
            output, sum_ = _flash(*piece.inputs(*streams), scale=ctx.scale, **piece.options(heads))
            outputs.append(output)
            sums.append(sum_)
        ctx.save_for_backward(*streams, *outputs, *sums)
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)[..., :head_dim].reshape(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        batch, seq, heads, head_dim = ctx.shape
        query, key, value, *results = ctx.saved_tensors
        grads = [torch.zeros_like(stream.transpose(1, 2)).transpose(1, 2) for stream in (query, key, value)]
        grad_output = F.pad(grad_output, (0, num_extra_channels(head_dim)))
        grad_output = grad_output.reshape(query.shape[0], query.shape[2], heads, -1).transpose(1, 2)
        outputs, sums = results[: len(ctx.pieces)], results[len(ctx.pieces) :]
        for piece, output, sum_ in zip(ctx.pieces, outputs, sums, strict=True):
            inputs = piece.inputs(query, key, value)
            grad = grad_output[:, :, piece.start : piece.stop]
            options = piece.options(heads)
            found = _flash_backward(
                grad, *inputs, output, sum_, 0.0, options["is_causal"], attn_mask=options["attn_mask"], scale=ctx.scale
            )
            piece.add(grads, found)
        grad_query, grad_key, grad_value = (
            grad.transpose(1, 2).reshape(batch, seq, -1, grad.shape[-1]).transpose(1, 2) for grad in grads
        )
        grad_bias = grad_key[..., head_dim].float() * head_dim**0.5
        return (*(grad[..., :head_dim] for grad in (grad_query, grad_key, grad_value)), grad_bias, None, None, None)


class _Piece:
    """Queries [start, stop) of a stream and the keys that they meet, which are consecutive or gathered.

    Args:
        first: of the consecutive keys, which reach to ``stop``.
        gathered: (batch, kv_heads, n) the keys before them, None where there are none.
        expiry: (batch, kv_heads, n + stop - first), the queries that no longer see these keys.
    """

    def __init__(self, start: int, stop: int, first: int, gathered=None, expiry=None):
        self.start, self.stop, self.first, self.gathered, self.expiry = start, stop, first, gathered, expiry

    def inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Iterator[torch.Tensor]:
        yield query[:, :, self.start : self.stop]
        for states in (key, value):
            found = states[:, :, self.first : self.stop]
            if self.gathered is not None:
                found = torch.cat([states.gather(2, self._index(states)), found], dim=2)
            groups = query.shape[1] // found.shape[1]
            yield found[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)

    def options(self, heads: int) -> dict:
        if self.expiry is None:
            return {"is_causal": True, "attn_mask": None}
        queries = torch.arange(self.start, self.stop)[:, None]
        mask = torch.where(queries < self.expiry[:, :, None], 0.0, -torch.inf)
        mask[..., self.start - self.stop :].masked_fill_(queries < queries.T, -torch.inf)
        return {"is_causal": False, "attn_mask": mask.repeat_interleave(heads // mask.shape[1], dim=1)}

    def add(self, grads: list[torch.Tensor], found: tuple[torch.Tensor, ...]) -> None:
        """Add what was found for this piece to the gradients of the streams."""
        grads[0][:, :, self.start : self.stop] = found[0]
        own = self.stop - self.first
        for grad, part in zip(grads[1:], found[1:], strict=True):
            part = part.unflatten(1, (grad.shape[1], -1)).sum(2)
            grad[:, :, self.first : self.stop] += part[:, :, -own:]
            if self.gathered is not None:
                grad.scatter_add_(2, self._index(grad), part[:, :, :-own])

    def _index(self, states: torch.Tensor) -> torch.Tensor:
        return self.gathered[..., None].expand(-1, -1, -1, states.shape[-1])


def _pieces(
    bias: torch.Tensor, window: KeyWindow, documents: list[int], order: torch.Tensor | None
) -> Iterator[_Piece]:
    """What attends together: whole documents as far as the window, then chunks of queries."""
    ends = list(itertools.accumulate(documents))
    for begin, end in zip([0, *ends], ends, strict=False):
        full = min(end, begin + window.size)
        yield _Piece(begin, full, begin)
        if full == end:
            continue
        expiry = key_expiry(bias[..., begin:end], window, order) + begin
        for start in range(full, end, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, end)
            before = expiry[..., : start - begin]
            left = (before >= start).nonzero()[:, -1].view(*before.shape[:2], window.size)
            lives = torch.cat([before.gather(2, left), expiry[..., start - begin : stop - begin]], dim=-1)
            yield _Piece(start, stop, start, left + begin, lives)


def _end_to_end(stream: torch.Tensor) -> torch.Tensor:
    """Rows behind one another: (batch, heads, seq, channels) -> (1, heads, batch * seq, channels), token by token."""
    return stream.transpose(1, 2).reshape(1, -1, stream.shape[1], stream.shape[3]).transpose(1, 2)
