"""Runs of the Triton kernels: what a forward and a backward pass of `triton_attention` launch, with which arguments."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from doge.model.attention import triton_kernels
from doge.model.attention.triton_blocks import Blocks, KernelBlocks

PRODUCT_ROWS = 64  # tokens of a block of `sum_output_products`


def launch_kernel(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the current device."""
    kernel[grid](*arguments, **options)


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, expiry: Tensor | None, document_ends: Tensor | None,
    blocks: KernelBlocks, launch: Callable[..., None] = launch_kernel,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention; see `triton_attention`, which chooses the blocks.

    Args:
        launch: Called for each kernel as `launch_kernel` is; another one may look at the launches or compile them.

    Returns:
        output (batch, seq, heads, head_dim), and the base-2 logarithms of the sums of weights (batch, heads, seq).
    """
    query, key, value = (_with_dense_rows(states) for states in (query, key, value))
    expiry = None if expiry is None else expiry.int().contiguous()
    batch, heads, seq, head_dim = query.shape
    own = blocks.attend
    output = query.new_empty(batch, seq, heads, head_dim)
    log_sum = query.new_empty(batch, heads, seq, dtype=torch.float32)
    with torch.cuda.device_of(query):
        lists, counts = list_key_blocks(expiry, own, launch)
        ends = _ends(key, expiry, document_ends)
        launch(
            triton_kernels.attend,
            (triton.cdiv(seq, own.queries), batch * heads),
            *(query, key, value, bias, ends, lists, counts, output, log_sum),
            *_strides(query, key, value, bias, ends, output),
            LISTED=expiry is not None,
            **_common_options(query, key, ends, own),
        )
    return output, log_sum


def run_backward(
    output_grad: Tensor, output: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor,
    expiry: Tensor | None, document_ends: Tensor | None, blocks: KernelBlocks,
    launch: Callable[..., None] = launch_kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key, value and bias, laid out as `empty_gradient` says; see `run_forward`."""
    output_grad, query, key, value = (_with_dense_rows(states) for states in (output_grad, query, key, value))
    expiry = None if expiry is None else expiry.int().contiguous()
    batch, heads, seq, head_dim = query.shape
    query_grad, key_grad, value_grad, bias_grad = (empty_gradient(x) for x in (query, key, value, bias))
    delta = torch.empty_like(log_sum)
    with torch.cuda.device_of(query):
        launch(
            triton_kernels.sum_output_products,
            (triton.cdiv(seq, PRODUCT_ROWS), batch * heads),
            *(output, output_grad, delta, *_strides_by_head(output), *_strides_by_head(output_grad)),
            heads=heads,
            seq=seq,
            HEAD_DIM=head_dim,
            BLOCK=PRODUCT_ROWS,
        )
        ends = _ends(key, expiry, document_ends)
        inputs = (query, key, value, bias, ends, output_grad, log_sum, delta)
        strides = _strides(query, key, value, bias, ends, output_grad)
        own = blocks.query
        lists, counts = list_key_blocks(expiry, own, launch)
        launch(
            triton_kernels.differentiate_query,
            (triton.cdiv(seq, own.queries), batch * heads),
            *(*inputs, lists, counts, query_grad, *strides, *query_grad.stride()[:3]),
            LISTED=expiry is not None,
            **_common_options(query, key, ends, own),
        )
        own = blocks.key
        launch(
            triton_kernels.differentiate_key,
            (triton.cdiv(seq, own.keys), batch * key.shape[1]),
            *(*inputs, key_grad, value_grad, bias_grad, *strides),
            *(*key_grad.stride()[:3], *value_grad.stride()[:3], *bias_grad.stride()),
            **_common_options(query, key, ends, own),
        )
    return query_grad, key_grad, value_grad, bias_grad


def empty_gradient(states: Tensor) -> Tensor:
    """An uninitialised gradient of (batch, heads, seq, ...), whatever its layout with tokens outermost in memory.

    So are the model's own states, and a compiled graph is told the layout before it is run.
    """
    return states.new_empty(states.transpose(1, 2).shape).transpose(1, 2)


def list_key_blocks(
    expiry: Tensor | None, blocks: Blocks, launch: Callable[..., None] = launch_kernel
) -> tuple[Tensor | None, Tensor | None]:
    """The blocks of keys in its past that each block of queries visits; `(None, None)` without expiry.

    Returns:
        lists: (batch, kv_heads, query_blocks, key_blocks) int32, from the left the blocks that need no mask, from the
            right those that do, undefined between.
        counts: (batch, kv_heads, query_blocks, 2) int32, the number of each.
    """
    if expiry is None:
        return None, None
    batch, kv_heads, seq = expiry.shape
    query_blocks, key_blocks = triton.cdiv(seq, blocks.queries), triton.cdiv(seq, blocks.keys)
    lists = expiry.new_empty(batch, kv_heads, query_blocks, key_blocks)
    counts = expiry.new_empty(batch, kv_heads, query_blocks, 2)
    launch(
        triton_kernels.fill_lists,
        (query_blocks, batch * kv_heads),
        *(expiry, lists, counts, seq, key_blocks),
        QUERIES=blocks.queries,
        KEYS=blocks.keys,
        CHUNK=min(64, triton.next_power_of_2(key_blocks)),
    )
    return lists, counts


def _with_dense_rows(states: Tensor) -> Tensor:
    """The same tensor, copied only if the channels of a token are not contiguous."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _ends(key: Tensor, expiry: Tensor | None, document_ends: Tensor | None) -> Tensor | None:
    """The query at which each key expires, (batch, kv_heads, seq); of documents, a view with one row for all heads."""
    if document_ends is None:
        return expiry
    return _with_dense_rows(document_ends)[:, None].expand(key.shape[:3])


def _strides(query, key, value, bias, ends, output) -> tuple[int, ...]:
    """The strides that all attention kernels begin with."""
    by_token = (stride for states in (query, key, value, bias) for stride in states.stride()[:3])
    return *by_token, *((0, 0) if ends is None else ends.stride()[:2]), *_strides_by_head(output)


def _strides_by_head(states: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of (batch, seq, heads, head_dim)."""
    return states.stride(0), states.stride(2), states.stride(1)


def _common_options(query: Tensor, key: Tensor, ends: Tensor | None, blocks: Blocks) -> dict[str, Any]:
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
        "EXPIRES": ends is not None,
        "RAGGED": seq % max(blocks.queries, blocks.keys) != 0,
        # Three products of TF32, 10 bits each, are nearly one of float32; other dtypes ignore the option.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
