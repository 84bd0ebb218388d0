"""Dynamic mask attention on a GPU: causal attention with a bias and a lifetime per key, by Triton kernels.

The score of query i and key j is `q_i . k_j / sqrt(head_dim) + bias_j`, and key j is seen by the queries
`j <= i < expiry_j`; `doge.model.attention` tells how dynamic masks and packed documents become such intervals. No mask
is materialised: memory is linear in the length, except for lists of key blocks with 4 bytes per pair of blocks.

The algorithm is that of FlashAttention-2 (Dao, 2023, arXiv:2307.08691).

For each block of queries, the key blocks wholly in its past are of three kinds: blocks whose keys have all expired are
skipped, blocks whose keys are all alive need no mask, and the others are masked by expiry. Only blocks on the diagonal
are masked by causality. For a block of keys, the queries of each kind are a range.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doge.model.attention.backends.registry import register
from doge.model.attention.gathered_chunks import attend_gathered_chunks
from doge.model.attention.window import KeyWindow, lifetimes

try:
    import triton
except ImportError:  # PyTorch's CPU builds come without it
    triton = None
else:
    from doge.model.attention import triton_kernels

# The kernels visit a block of keys until all of its keys have expired, which is nearly half of the sequence per query.
# In sequences longer than this many chunks, gathering the live keys is cheaper, although it wastes as many queries.
GATHER_FROM_CHUNKS = 4
QUERY_CHUNK = 1024  # queries of a chunk at least, so that a chunk fills a GPU
LARGE_SHARED_MEMORY = 200 * 1024  # bytes; data centre GPUs since H100 have more, others (99 KiB on most cards) less


class Blocks(NamedTuple):
    """Block sizes: attention and the query's gradient use `queries` x `keys`, the key's gradient the transpose."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@register
class TritonKernels:
    """Differentiable once."""

    name = "triton"
    device_types = ("cuda",)
    priority = 1

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str | None:
        return "it has no dropout" if dropout else unsupported_reason(device, dtype, head_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
        window: KeyWindow, document_ends: Tensor | None, order: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        return _attend(query, key, value, bias, lifetimes(bias, window, document_ends, order), window.size)


@torch.compiler.disable  # it would trace the kernels' autograd.Function
def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, expiry: Tensor | None, window: int) -> Tensor:
    chunk = max(window, QUERY_CHUNK)
    if expiry is None or query.shape[2] <= GATHER_FROM_CHUNKS * chunk:
        return triton_attention(query, key, value, bias, expiry)
    return attend_gathered_chunks(triton_attention, query, key, value, bias, expiry, window, chunk)


def supports(query: torch.Tensor) -> bool:
    """Whether the kernels support queries (..., head_dim) of this width and dtype on this device.

    They run on NVIDIA GPUs of compute capability 8.0 or later, and slowly on the CPU under `TRITON_INTERPRET=1`.
    """
    return unsupported_reason(query.device, query.dtype, query.shape[-1]) is None


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels do not support such queries; None if they do."""
    if triton is None:
        return "Triton is not installed"
    if not (16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0):
        return f"head_dim is {head_dim}, and its kernels support 16, 32, 64, 128 and 256"
    if triton.knobs.runtime.interpret:  # its products of bfloat16 are wrong
        return None if dtype in (torch.float16, torch.float32) else f"Triton's interpreter has no {dtype}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels do not support {dtype}"
    if device.type != "cuda" or torch.version.hip is not None or _capability(device)[0] < 8:
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Shared memory that a block of threads may use, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's types lack it


def choose_blocks(query: torch.Tensor) -> tuple[Blocks, Blocks]:
    """The blocks of the forward and of the backward pass, close to the choice of PyTorch's flex attention."""
    head_dim = query.shape[-1]
    if query.dtype == torch.float32 or not query.is_cuda:  # exact rather than fast
        blocks = Blocks(32, 32, 4, 1) if head_dim <= 128 else Blocks(16, 16, 4, 1)
        return blocks, blocks
    if head_dim > 128:
        return Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)
    forward = Blocks(128, 64, 8 if head_dim == 128 else 4, 3)
    if _shared_memory(query.device) >= LARGE_SHARED_MEMORY:
        return forward, Blocks(128, 64, 8, 3)
    return forward, Blocks(64, 64, forward.num_warps, 2)


def triton_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, expiry: torch.Tensor | None
) -> torch.Tensor:
    """Attention of each query i to the keys j with `j <= i < expiry_j`; differentiable in all but the expiry.

    Args:
        query: (batch, heads, seq, head_dim), rotated; `supports` must accept it.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, added to the scores of each key; a key of PADDED_KEY_BIAS is never seen.
        expiry: (batch, kv_heads, seq), int32, the first query that no longer sees each key; `None`: no key expires.

    Returns:
        (batch, seq, heads, head_dim) in the query's dtype, zero where a query sees no key.

    Raises:
        ValueError: `supports` declines the query.
    """
    if not supports(query):
        raise ValueError(
            f"The attention kernels do not support {query.dtype} queries of head_dim {query.shape[-1]} on "
            f"{query.device}: use doge.model.attention.dynamic_mask_attention."
        )
    return _TritonAttention.apply(query, key, value, bias, expiry)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, expiry):
        query, key, value = (_with_dense_rows(states) for states in (query, key, value))
        expiry = None if expiry is None else expiry.int().contiguous()
        batch, heads, seq, head_dim = query.shape
        blocks, ctx.blocks = choose_blocks(query)
        output = query.new_empty(batch, seq, heads, head_dim)
        log_sum = query.new_empty(batch, heads, seq, dtype=torch.float32)
        with torch.cuda.device_of(query):
            lists, counts = _list_key_blocks(expiry, seq, blocks)
            triton_kernels.attend[triton.cdiv(seq, blocks.queries), batch * heads](
                *(query, key, value, bias, expiry, lists, counts, output, log_sum),
                *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias.stride()),
                *_strides_by_head(output),
                **_common_options(query, key, expiry, blocks),
            )
        if blocks[:2] != ctx.blocks[:2]:
            lists, counts = None, None
        ctx.save_for_backward(query, key, value, bias, expiry, lists, counts, output, log_sum)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_grad):
        query, key, value, bias, expiry, lists, counts, output, log_sum = ctx.saved_tensors
        batch, heads, seq, head_dim = query.shape
        blocks = ctx.blocks
        output_grad = _with_dense_rows(output_grad)
        query_grad, key_grad, value_grad, bias_grad = (torch.empty_like(x) for x in (query, key, value, bias))
        delta = torch.empty_like(log_sum)
        inputs = (query, key, value, bias, expiry, output_grad, log_sum, delta)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias.stride())
        strides = (*strides, *_strides_by_head(output_grad))
        options = _common_options(query, key, expiry, blocks)
        with torch.cuda.device_of(query):
            if lists is None:
                lists, counts = _list_key_blocks(expiry, seq, blocks)
            triton_kernels.sum_output_products[triton.cdiv(seq, 64), batch * heads](
                *(output, output_grad, delta, *_strides_by_head(output), *_strides_by_head(output_grad)),
                heads=heads,
                seq=seq,
                HEAD_DIM=head_dim,
                BLOCK=64,
            )
            triton_kernels.differentiate_query[triton.cdiv(seq, blocks.queries), batch * heads](
                *(*inputs, lists, counts, query_grad, *strides, *query_grad.stride()[:3]), **options
            )
            options |= {"QUERIES": blocks.keys, "KEYS": blocks.queries}
            triton_kernels.differentiate_key[triton.cdiv(seq, blocks.queries), batch * key.shape[1]](
                *(*inputs, key_grad, value_grad, bias_grad, *strides),
                *(*key_grad.stride()[:3], *value_grad.stride()[:3], *bias_grad.stride()),
                **options,
            )
        return query_grad, key_grad, value_grad, bias_grad, None


def _with_dense_rows(states: torch.Tensor) -> torch.Tensor:
    """The same tensor, copied only if the channels of a token are not contiguous."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _strides_by_head(states: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of (batch, seq, heads, head_dim)."""
    return states.stride(0), states.stride(2), states.stride(1)


def _common_options(query, key, expiry, blocks) -> dict[str, Any]:
    """The arguments that all attention kernels share."""
    heads, seq, head_dim = query.shape[1:]
    return {
        "heads": heads,
        "kv_heads": key.shape[1],
        "seq": seq,
        "scale": head_dim**-0.5,
        "HEAD_DIM": head_dim,
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "EXPIRES": expiry is not None,
        "RAGGED": seq % max(blocks.queries, blocks.keys) != 0,
        # Three products of TF32, 10 bits each, are nearly one of float32; other dtypes ignore the option.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _list_key_blocks(expiry, seq, blocks):
    """The blocks of keys in its past that each block of queries visits; `(None, None)` without expiry.

    Returns:
        lists: (batch, kv_heads, query_blocks, key_blocks) int32, from the left the blocks that need no mask, from the
            right those that do, undefined between.
        counts: (batch, kv_heads, query_blocks, 2) int32, the number of each.
    """
    if expiry is None:
        return None, None
    batch, kv_heads, _ = expiry.shape
    query_blocks, key_blocks = triton.cdiv(seq, blocks.queries), triton.cdiv(seq, blocks.keys)
    lists = expiry.new_empty(batch, kv_heads, query_blocks, key_blocks, dtype=torch.int32)
    counts = expiry.new_empty(batch, kv_heads, query_blocks, 2, dtype=torch.int32)
    triton_kernels.fill_lists[query_blocks, batch * kv_heads](
        *(expiry, lists, counts, seq, key_blocks),
        QUERIES=blocks.queries,
        KEYS=blocks.keys,
        CHUNK=min(64, triton.next_power_of_2(key_blocks)),
    )
    return lists, counts
