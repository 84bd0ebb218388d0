"""Dynamic mask attention on a GPU: causal attention with a bias and a lifetime per key, by Triton kernels.

The score of query i and key j is `q_i . k_j / sqrt(head_dim) + bias_j`, and key j is seen by the queries
`j <= i < expiry_j`; `doge.model.attention` tells how dynamic masks and packed documents become such intervals. No mask
is materialised: memory is linear in the length, except for lists of key blocks with 4 bytes per pair of blocks, which
only sequences longer than the window need. For torch.compile it is a single operation.

The algorithm is that of FlashAttention-2 (Dao, 2023, arXiv:2307.08691).

For each block of queries, the key blocks wholly in its past are of three kinds: blocks whose keys have all expired are
skipped, blocks whose keys are all alive need no mask, and the others are masked by expiry. Only blocks on the diagonal
are masked by causality. For a block of keys, the queries of each kind are a range.
"""

import functools
from dataclasses import astuple

import torch
from torch import Tensor

from doge.model.attention.backends.registry import register
from doge.model.attention.gathered_chunks import attend_gathered_chunks
from doge.model.attention.triton_blocks import Card, KernelBlocks, choose_blocks
from doge.model.attention.window import KeyWindow, lifetimes

try:
    import triton
except ImportError:  # PyTorch's CPU builds come without it
    triton = None
else:
    from doge.model.attention.triton_launches import empty_gradient, run_backward, run_forward

# The kernels visit a block of keys until all of its keys have expired, which is nearly half of the sequence per query.
# In sequences longer than this many chunks, gathering the live keys is cheaper, although it wastes as many queries.
GATHER_FROM_CHUNKS = 4
QUERY_CHUNK = 1024  # queries of a chunk at least, so that a chunk fills a GPU


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
        seq = query.shape[2]
        if seq <= window.size:  # all that ends is a document, the same in every layer: the kernels need no more
            return _attend(query, key, value, bias, None, document_ends)[0]
        expiry = _lifetimes(bias.detach(), document_ends, order, *astuple(window))
        chunk = max(window.size, QUERY_CHUNK)
        if seq <= GATHER_FROM_CHUNKS * chunk:
            return _attend(query, key, value, bias, expiry, None)[0]
        return attend_gathered_chunks(_attend_with_expiry, query, key, value, bias, expiry, window.size, chunk)


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
    if device.type != "cuda" or torch.version.hip is not None or _card(device).architecture < 80:
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


@functools.cache
def _card(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's types lack it
    return Card(10 * properties.major + properties.minor, shared)


def _blocks(query: Tensor) -> KernelBlocks:
    return choose_blocks(_card(query.device) if query.is_cuda else None, query.dtype, query.shape[-1])


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
    expiry: Tensor | None = None, document_ends: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each query i to the keys j with `j <= i < expiry_j`; differentiable in query, key, value and bias.

    Args:
        query: (batch, heads, seq, head_dim), rotated; `supports` must accept it.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, added to the scores of each key; a key of PADDED_KEY_BIAS is never seen.
        expiry: (batch, kv_heads, seq), integers, the first query that no longer sees each key; `None`: no key expires.
        document_ends: (batch, seq), integers, where each token's document ends: what every key's expiry is where
            only documents end. Faster, and instead of expiry.

    Returns:
        (batch, seq, heads, head_dim) in the query's dtype, zero where a query sees no key.

    Raises:
        ValueError: `supports` declines the query, or there are both expiry and document_ends.
    """
    if not supports(query):
        raise ValueError(
            f"The attention kernels do not support {query.dtype} queries of head_dim {query.shape[-1]} on "
            f"{query.device}: use doge.model.attention.dynamic_mask_attention."
        )
    if expiry is not None and document_ends is not None:
        raise ValueError("Give expiry or document_ends, not both: doge.model.attention.lifetimes makes one of them.")
    return _attend(query, key, value, bias, expiry, document_ends)[0]


@torch.library.custom_op("doge::key_lifetimes", mutates_args=())
def _lifetimes(
    bias: Tensor, document_ends: Tensor | None, order: Tensor | None, window: int, num_sinks: int, num_local: int
) -> Tensor:
    """`lifetimes` in sequences longer than the window, int32."""
    expiry = lifetimes(bias, KeyWindow(window, num_sinks, num_local), document_ends, order)
    assert expiry is not None
    return expiry.int().contiguous()


@_lifetimes.register_fake
def _(bias, document_ends, order, window, num_sinks, num_local):
    return bias.new_empty(bias.shape, dtype=torch.int32)


@torch.library.custom_op("doge::triton_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, expiry: Tensor | None, document_ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the base-2 logarithms of the sums of weights (batch, heads, seq)."""
    return run_forward(query, key, value, bias, expiry, document_ends, _blocks(query))


@_attend.register_fake
def _(query, key, value, bias, expiry, document_ends):
    batch, heads, seq, head_dim = query.shape
    return query.new_empty(batch, seq, heads, head_dim), query.new_empty(batch, heads, seq, dtype=torch.float32)


@torch.library.custom_op("doge::triton_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, output: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
    expiry: Tensor | None, document_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return run_backward(grad, output, log_sum, query, key, value, bias, expiry, document_ends, _blocks(query))


@_backward.register_fake
def _(grad, output, log_sum, query, key, value, bias, expiry, document_ends):
    return tuple(empty_gradient(states) for states in (query, key, value, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _differentiate(ctx, grad, _):
    return (*_backward(grad, *ctx.saved_tensors), None, None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


def _attend_with_expiry(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, expiry: Tensor) -> Tensor:
    return _attend(query, key, value, bias, expiry, None)[0]
