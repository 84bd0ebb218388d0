"""Causal attention with a bias and a lifetime per key, as Triton kernels: dynamic mask attention on a GPU.

The score of query i and key j is `q_i . k_j / sqrt(head_dim) + bias_j`, and key j is seen by the queries
`j <= i < expiry_j`; `doge.attention` says how dynamic masks and packed documents become such intervals. No mask is
materialised: memory is linear in the length, but for lists of key blocks of 4 bytes for each pair of blocks.

The algorithm is that of flash attention 2 (Dao, 2023).

For each block of queries the key blocks wholly in its past fall into three kinds: those whose keys have all expired
are not visited, those whose keys are all alive need no mask, and the rest are masked by expiry. Only the blocks on the
diagonal are masked by causality. Seen from a block of keys, the queries of each kind are a range.
"""

import functools
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's CPU builds come without it
    triton = None


LARGE_SHARED_MEMORY = 200 * 1024  # bytes; data centre GPUs since H100 have more, others (99 KiB on most cards) less


class Blocks(NamedTuple):
    """How the work is cut: attention and the query's gradient go by `queries` x `keys`, the key's by the transpose."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def supports(query: torch.Tensor) -> bool:
    """Whether the kernels take queries (..., head_dim) of this width and dtype on this device.

    They run on NVIDIA GPUs of compute capability 8.0 or later, and on the CPU, slowly, under `TRITON_INTERPRET=1`.
    """
    return refusal(query.device, query.dtype, query.shape[-1]) is None


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels do not take such queries; None if they do."""
    if triton is None:
        return "Triton is not installed"
    if not (16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0):
        return f"head_dim is {head_dim}, and they take 16, 32, 64, 128 and 256"
    if triton.knobs.runtime.interpret:  # its products of bfloat16 are wrong
        return None if dtype in (torch.float16, torch.float32) else f"Triton's interpreter has no {dtype}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they do not take {dtype}"
    if device.type != "cuda" or torch.version.hip is not None or _capability(device)[0] < 8:
        return "they need an NVIDIA GPU of compute capability 8.0 or later"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def choose_blocks(query: torch.Tensor) -> tuple[Blocks, Blocks]:
    """The blocks of the forward and of the backward pass, about as PyTorch's flex attention chooses them."""
    head_dim = query.shape[-1]
    if query.dtype == torch.float32 or not query.is_cuda:  # exact, not fast
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
    """Attention of each query i to the keys j with `j <= i < expiry_j`; differentiable but for the expiry.

    Args:
        query: (batch, heads, seq, head_dim), rotated; one that `supports` accepts.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, added to the scores of each key; a key of PADDED_KEY_BIAS is never seen.
        expiry: (batch, kv_heads, seq), int32, the first query that no longer sees each key; `None`: no key expires.

    Returns:
        (batch, seq, heads, head_dim) in the query's dtype, zero where a query sees no key.
    """
    if not supports(query):
        raise ValueError(
            f"The attention kernels do not take {query.dtype} queries of head_dim {query.shape[-1]} on {query.device}: "
            "ask `supports` first and use doge.attention.dynamic_mask_attention where it declines."
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
            _attend[triton.cdiv(seq, blocks.queries), batch * heads](
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
            _sum_output_products[triton.cdiv(seq, 64), batch * heads](
                *(output, output_grad, delta, *_strides_by_head(output), *_strides_by_head(output_grad)),
                heads=heads,
                seq=seq,
                HEAD_DIM=head_dim,
                BLOCK=64,
            )
            _differentiate_query[triton.cdiv(seq, blocks.queries), batch * heads](
                *(*inputs, lists, counts, query_grad, *strides, *query_grad.stride()[:3]), **options
            )
            options |= {"QUERIES": blocks.keys, "KEYS": blocks.queries}
            _differentiate_key[triton.cdiv(seq, blocks.queries), batch * key.shape[1]](
                *(*inputs, key_grad, value_grad, bias_grad, *strides),
                *(*key_grad.stride()[:3], *value_grad.stride()[:3], *bias_grad.stride()),
                **options,
            )
        return query_grad, key_grad, value_grad, bias_grad, None


def _with_dense_rows(states: torch.Tensor) -> torch.Tensor:
    """The same, copied only where the channels of a token do not lie side by side."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _strides_by_head(states: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of (batch, seq, heads, head_dim)."""
    return states.stride(0), states.stride(2), states.stride(1)


def _common_options(query, key, expiry, blocks) -> dict:
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
        # Three products of TF32, 10 bits each, are nearly one of float32; the option means nothing to other dtypes.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _list_key_blocks(expiry, seq, blocks):
    """For each block of queries the blocks of keys in its past to visit; `(None, None)` without expiry.

    Returns:
        lists: (batch, kv_heads, query_blocks, key_blocks) int32, from the left the blocks that need no mask, from the
            right those that do, undefined between.
        counts: (batch, kv_heads, query_blocks, 2) int32, how many of either.
    """
    if expiry is None:
        return None, None
    batch, kv_heads, _ = expiry.shape
    query_blocks, key_blocks = triton.cdiv(seq, blocks.queries), triton.cdiv(seq, blocks.keys)
    lists = expiry.new_empty(batch, kv_heads, query_blocks, key_blocks, dtype=torch.int32)
    counts = expiry.new_empty(batch, kv_heads, query_blocks, 2, dtype=torch.int32)
    _fill_lists[query_blocks, batch * kv_heads](
        *(expiry, lists, counts, seq, key_blocks),
        QUERIES=blocks.queries,
        KEYS=blocks.keys,
        CHUNK=min(64, triton.next_power_of_2(key_blocks)),
    )
    return lists, counts


if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    LEAST_SCORE = tl.constexpr(-1e29)  # beside it a padded key weighs nothing: PADDED_KEY_BIAS is less

    @triton.jit
    def _fill_lists(
        expiry, lists, counts, seq, key_blocks, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr
    ):
        """`_list_key_blocks` for one block of queries and one kv head, CHUNK blocks of keys at a time."""
        query_block = tl.program_id(0)
        row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + query_block
        expiry += tl.program_id(1).to(tl.int64) * seq
        lists += row * key_blocks
        first_query = query_block * QUERIES
        past = first_query // KEYS  # blocks of keys wholly before the first query
        num_whole = 0
        num_partial = 0
        for start in range(0, past, CHUNK):
            block = start + tl.arange(0, CHUNK)
            offsets = block[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
            expiries = tl.load(expiry + offsets, mask=(block < past)[:, None], other=0)
            whole = (tl.min(expiries, 1) >= first_query + QUERIES).to(tl.int32)
            partial = (tl.max(expiries, 1) > first_query).to(tl.int32) - whole
            whole_rank = num_whole + tl.cumsum(whole, 0)
            partial_rank = num_partial + tl.cumsum(partial, 0)
            tl.store(lists + whole_rank - 1, block, mask=whole > 0)
            tl.store(lists + key_blocks - partial_rank, block, mask=partial > 0)
            num_whole += tl.sum(whole, 0)
            num_partial += tl.sum(partial, 0)
        tl.store(counts + row * 2, num_whole)
        tl.store(counts + row * 2 + 1, num_partial)

    @triton.jit
    def _load_rows(states, start, stride, seq, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
        """(ROWS, HEAD_DIM) from token `start` on; zero from token `seq` on if CHECK."""
        rows = tl.arange(0, ROWS)
        states += start * tl.cast(stride, tl.int64)
        pointers = states + rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
        if CHECK:
            return tl.load(pointers, mask=(start + rows < seq)[:, None], other=0.0)
        else:
            return tl.load(pointers)

    @triton.jit
    def _store_rows(states, tile, start, stride, seq, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
        """The inverse of `_load_rows`."""
        rows = tl.arange(0, ROWS)
        states += start * tl.cast(stride, tl.int64)
        pointers = states + rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
        tile = tile.to(states.dtype.element_ty)
        if CHECK:
            tl.store(pointers, tile, mask=(start + rows < seq)[:, None])
        else:
            tl.store(pointers, tile)

    @triton.jit
    def _head(states, batch, head, batch_stride, head_stride):
        """Where a head of a row of the batch begins."""
        return states + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride

    @triton.jit
    def _scores(
        query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, EXPIRES: tl.constexpr,
        CHECK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Scores in powers of two, (QUERIES, KEYS), minus infinity where a key is not seen; and the keys."""
        key = _load_rows(key_head, start, key_stride, seq, KEYS, HEAD_DIM, CHECK)
        j = start + tl.arange(0, KEYS)
        bias_head += start * tl.cast(bias_stride, tl.int64)
        bias_pointers = bias_head + tl.arange(0, KEYS) * bias_stride
        bias = tl.load(bias_pointers, mask=j < seq, other=0.0) if CHECK else tl.load(bias_pointers)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = scores * scale + (bias * LOG2_E)[None, :]
        if CAUSAL or EXPIRES:
            i = first_query + tl.arange(0, QUERIES)
            if EXPIRES:
                expiry = tl.load(expiry_head + j, mask=j < seq, other=0) if CHECK else tl.load(expiry_head + j)
                visible = i[:, None] < expiry[None, :]
                if CAUSAL:
                    visible = visible & (j[None, :] <= i[:, None])
            else:
                visible = j[None, :] <= i[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        return scores, key

    @triton.jit
    def _attend_to_blocks(
        total, row_max, row_sum, query, key_head, value_head, bias_head, expiry_head, blocks, first, last,
        first_query, key_stride, value_stride, bias_stride, seq, scale,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
        EXPIRES: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Adds key blocks `first` to `last`, or those that `blocks` lists there, to the running softmax."""
        for index in range(first, last):
            block = tl.load(blocks + index) if LISTED else index
            start = block * KEYS
            scores, _ = _scores(
                query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
                QUERIES, KEYS, HEAD_DIM, CAUSAL, EXPIRES, CHECK, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            weights = tl.exp2(scores - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(weights, 1)
            value = _load_rows(value_head, start, value_stride, seq, KEYS, HEAD_DIM, CHECK)
            total = tl.dot(weights.to(value.dtype), value, total * decay[:, None], input_precision=PRECISION)
            row_max = new_max
        return total, row_max, row_sum

    @triton.jit
    def _attend(
        query, key, value, bias, expiry, lists, counts, output, log_sum,
        query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
        bias_batch, bias_head, bias_token, output_batch, output_head, output_token, heads, kv_heads, seq, scale,
        HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EXPIRES: tl.constexpr,
        RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The output of one block of queries of one head, and the logarithms of the sums of its weights."""
        query_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
        batch = tl.program_id(1) // heads
        head = tl.program_id(1) % heads
        kv_head = head // (heads // kv_heads)
        kv_row = batch.to(tl.int64) * kv_heads + kv_head
        key = _head(key, batch, kv_head, key_batch, key_head)
        value = _head(value, batch, kv_head, value_batch, value_head)
        bias = _head(bias, batch, kv_head, bias_batch, bias_head)
        first_query = query_block * QUERIES
        query = _head(query, batch, head, query_batch, query_head)
        query = _load_rows(query, first_query, query_token, seq, QUERIES, HEAD_DIM, RAGGED)
        scale = scale * LOG2_E

        total = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
        maximum = tl.full([QUERIES], LEAST_SCORE, tl.float32)
        row_sum = tl.zeros([QUERIES], tl.float32)
        diagonal = first_query // KEYS
        if EXPIRES:
            expiry += kv_row * seq
            key_blocks = tl.cdiv(seq, KEYS)
            row = kv_row * tl.num_programs(0) + query_block
            lists += row * key_blocks
            num_whole = tl.load(counts + row * 2)
            num_partial = tl.load(counts + row * 2 + 1)
            total, maximum, row_sum = _attend_to_blocks(
                total, maximum, row_sum, query, key, value, bias, expiry, lists, 0, num_whole,
                first_query, key_token, value_token, bias_token, seq, scale,
                QUERIES, KEYS, HEAD_DIM, True, False, False, False, PRECISION,
            )  # fmt: skip
            total, maximum, row_sum = _attend_to_blocks(
                total, maximum, row_sum, query, key, value, bias, expiry, lists, key_blocks - num_partial, key_blocks,
                first_query, key_token, value_token, bias_token, seq, scale,
                QUERIES, KEYS, HEAD_DIM, True, False, True, False, PRECISION,
            )  # fmt: skip
        else:
            total, maximum, row_sum = _attend_to_blocks(
                total, maximum, row_sum, query, key, value, bias, expiry, lists, 0, diagonal,
                first_query, key_token, value_token, bias_token, seq, scale,
                QUERIES, KEYS, HEAD_DIM, False, False, False, False, PRECISION,
            )  # fmt: skip
        last = tl.cdiv(tl.minimum(first_query + QUERIES, seq), KEYS)
        total, maximum, row_sum = _attend_to_blocks(
            total, maximum, row_sum, query, key, value, bias, expiry, lists, diagonal, last,
            first_query, key_token, value_token, bias_token, seq, scale,
            QUERIES, KEYS, HEAD_DIM, False, True, EXPIRES, RAGGED, PRECISION,
        )  # fmt: skip

        i = first_query + tl.arange(0, QUERIES)
        seen = row_sum > 0
        total = total / tl.where(seen, row_sum, 1.0)[:, None]
        output = _head(output, batch, head, output_batch, output_head)
        _store_rows(output, total, first_query, output_token, seq, QUERIES, HEAD_DIM, RAGGED)
        rows = tl.program_id(1).to(tl.int64) * seq + i
        # Of an infinite sum, the weights that the backward pass recomputes are zero.
        tl.store(log_sum + rows, tl.where(seen, maximum + tl.log2(row_sum), float("inf")), mask=i < seq)

    @triton.jit
    def _sum_output_products(
        output, output_grad, delta, output_batch, output_head, output_token, grad_batch, grad_head, grad_token,
        heads, seq, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """delta (batch, heads, seq): the products of output and its gradient, summed over the channels."""
        start = tl.program_id(0) * BLOCK
        batch = tl.program_id(1) // heads
        head = tl.program_id(1) % heads
        output = _head(output, batch, head, output_batch, output_head)
        output_grad = _head(output_grad, batch, head, grad_batch, grad_head)
        outputs = _load_rows(output, start, output_token, seq, BLOCK, HEAD_DIM, True).to(tl.float32)
        grads = _load_rows(output_grad, start, grad_token, seq, BLOCK, HEAD_DIM, True).to(tl.float32)
        i = start + tl.arange(0, BLOCK)
        tl.store(delta + tl.program_id(1).to(tl.int64) * seq + i, tl.sum(outputs * grads, 1), mask=i < seq)

    @triton.jit
    def _query_gradient_of_blocks(
        query_grad, query, output_grad, log_sum, delta, key_head, value_head, bias_head, expiry_head, blocks,
        first, last, first_query, key_stride, value_stride, bias_stride, seq, scale,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
        EXPIRES: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Adds what key blocks `first` to `last`, or those that `blocks` lists there, give to the gradient."""
        for index in range(first, last):
            block = tl.load(blocks + index) if LISTED else index
            start = block * KEYS
            value = _load_rows(value_head, start, value_stride, seq, KEYS, HEAD_DIM, CHECK)
            scores, key = _scores(
                query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
                QUERIES, KEYS, HEAD_DIM, CAUSAL, EXPIRES, CHECK, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(scores - log_sum[:, None])
            weight_grad = tl.dot(output_grad, tl.trans(value), input_precision=PRECISION)
            score_grad = weights * (weight_grad - delta[:, None])
            query_grad = tl.dot(score_grad.to(key.dtype), key, query_grad, input_precision=PRECISION)
        return query_grad

    @triton.jit
    def _differentiate_query(
        query, key, value, bias, expiry, output_grad, log_sum, delta, lists, counts, query_grad,
        query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
        bias_batch, bias_head, bias_token, output_batch, output_head, output_token,
        query_grad_batch, query_grad_head, query_grad_token, heads, kv_heads, seq, scale,
        HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EXPIRES: tl.constexpr,
        RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The gradient of one block of queries of one head."""
        query_block = tl.num_programs(0) - 1 - tl.program_id(0)
        batch = tl.program_id(1) // heads
        head = tl.program_id(1) % heads
        kv_head = head // (heads // kv_heads)
        kv_row = batch.to(tl.int64) * kv_heads + kv_head
        key = _head(key, batch, kv_head, key_batch, key_head)
        value = _head(value, batch, kv_head, value_batch, value_head)
        bias = _head(bias, batch, kv_head, bias_batch, bias_head)
        first_query = query_block * QUERIES
        query = _head(query, batch, head, query_batch, query_head)
        query = _load_rows(query, first_query, query_token, seq, QUERIES, HEAD_DIM, RAGGED)
        output_grad = _head(output_grad, batch, head, output_batch, output_head)
        output_grad = _load_rows(output_grad, first_query, output_token, seq, QUERIES, HEAD_DIM, RAGGED)
        i = first_query + tl.arange(0, QUERIES)
        rows = tl.program_id(1).to(tl.int64) * seq + i
        log_sum = tl.load(log_sum + rows, mask=i < seq, other=float("inf"))
        delta = tl.load(delta + rows, mask=i < seq, other=0.0)
        exponent = scale * LOG2_E

        gradient = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
        diagonal = first_query // KEYS
        if EXPIRES:
            expiry += kv_row * seq
            key_blocks = tl.cdiv(seq, KEYS)
            row = kv_row * tl.num_programs(0) + query_block
            lists += row * key_blocks
            num_whole = tl.load(counts + row * 2)
            num_partial = tl.load(counts + row * 2 + 1)
            gradient = _query_gradient_of_blocks(
                gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
                0, num_whole, first_query, key_token, value_token, bias_token, seq, exponent,
                QUERIES, KEYS, HEAD_DIM, True, False, False, False, PRECISION,
            )  # fmt: skip
            gradient = _query_gradient_of_blocks(
                gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
                key_blocks - num_partial, key_blocks, first_query, key_token, value_token, bias_token, seq, exponent,
                QUERIES, KEYS, HEAD_DIM, True, False, True, False, PRECISION,
            )  # fmt: skip
        else:
            gradient = _query_gradient_of_blocks(
                gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
                0, diagonal, first_query, key_token, value_token, bias_token, seq, exponent,
                QUERIES, KEYS, HEAD_DIM, False, False, False, False, PRECISION,
            )  # fmt: skip
        last = tl.cdiv(tl.minimum(first_query + QUERIES, seq), KEYS)
        gradient = _query_gradient_of_blocks(
            gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
            diagonal, last, first_query, key_token, value_token, bias_token, seq, exponent,
            QUERIES, KEYS, HEAD_DIM, False, True, EXPIRES, RAGGED, PRECISION,
        )  # fmt: skip
        query_grad = _head(query_grad, batch, head, query_grad_batch, query_grad_head)
        _store_rows(query_grad, gradient * scale, first_query, query_grad_token, seq, QUERIES, HEAD_DIM, RAGGED)

    @triton.jit
    def _key_gradients_of_blocks(
        key_grad, value_grad, bias_grad, key, value, bias, expiry, first_key, query_head, output_grad_head,
        log_sum, delta, first, last, query_stride, output_stride, seq, scale,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
        EXPIRES: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Adds what query blocks `first` to `last` give to the gradients of a block of keys; tiles: keys x queries."""
        for block in range(first, last):
            start = block * QUERIES
            i = start + tl.arange(0, QUERIES)
            query = _load_rows(query_head, start, query_stride, seq, QUERIES, HEAD_DIM, RAGGED)
            output_grad = _load_rows(output_grad_head, start, output_stride, seq, QUERIES, HEAD_DIM, RAGGED)
            if RAGGED:
                logarithm = tl.load(log_sum + i, mask=i < seq, other=float("inf"))
                products = tl.load(delta + i, mask=i < seq, other=0.0)
            else:
                logarithm = tl.load(log_sum + i)
                products = tl.load(delta + i)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale + bias[:, None]
            weights = tl.exp2(scores - logarithm[None, :])
            if CAUSAL:
                j = first_key + tl.arange(0, KEYS)
                weights = tl.where(j[:, None] <= i[None, :], weights, 0.0)
            if EXPIRES:
                weights = tl.where(i[None, :] < expiry[:, None], weights, 0.0)
            value_grad = tl.dot(weights.to(output_grad.dtype), output_grad, value_grad, input_precision=PRECISION)
            weight_grad = tl.dot(value, tl.trans(output_grad), input_precision=PRECISION)
            score_grad = weights * (weight_grad - products[None, :])
            key_grad = tl.dot(score_grad.to(query.dtype), query, key_grad, input_precision=PRECISION)
            bias_grad += tl.sum(score_grad, 1)
        return key_grad, value_grad, bias_grad

    @triton.jit
    def _differentiate_key(
        query, key, value, bias, expiry, output_grad, log_sum, delta, key_grad, value_grad, bias_grad,
        query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
        bias_batch, bias_head, bias_token, output_batch, output_head, output_token,
        key_grad_batch, key_grad_head, key_grad_token, value_grad_batch, value_grad_head, value_grad_token,
        bias_grad_batch, bias_grad_head, bias_grad_token, heads, kv_heads, seq, scale,
        HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EXPIRES: tl.constexpr,
        RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The gradients of one block of keys of one kv head: key, value and bias."""
        first_key = tl.program_id(0) * KEYS  # the keys that most queries see first
        batch = tl.program_id(1) // kv_heads
        kv_head = tl.program_id(1) % kv_heads
        group = heads // kv_heads
        j = first_key + tl.arange(0, KEYS)
        key = _head(key, batch, kv_head, key_batch, key_head)
        keys = _load_rows(key, first_key, key_token, seq, KEYS, HEAD_DIM, RAGGED)
        value = _head(value, batch, kv_head, value_batch, value_head)
        values = _load_rows(value, first_key, value_token, seq, KEYS, HEAD_DIM, RAGGED)
        bias = _head(bias, batch, kv_head, bias_batch, bias_head)
        biases = tl.load(bias + j.to(tl.int64) * bias_token, mask=j < seq, other=0.0) * LOG2_E
        exponent = scale * LOG2_E

        # Query blocks: `diagonal` to `below` are masked by causality, `below` to `whole` see every key, and those from
        # `whole` to `last` are masked by expiry.
        diagonal = first_key // QUERIES
        last = tl.cdiv(seq, QUERIES)
        below = tl.minimum(tl.cdiv(first_key + KEYS - 1, QUERIES), last)
        whole = last
        expiries = j
        if EXPIRES:
            expiries = tl.load(expiry + tl.program_id(1).to(tl.int64) * seq + j, mask=j < seq, other=0)
            last = tl.minimum(tl.cdiv(tl.max(expiries, 0), QUERIES), last)
            below = tl.minimum(below, last)
            whole = tl.min(tl.where(j < seq, expiries, seq), 0) // QUERIES
            whole = tl.minimum(tl.maximum(whole, below), last)

        keys_grad = tl.zeros([KEYS, HEAD_DIM], tl.float32)
        values_grad = tl.zeros([KEYS, HEAD_DIM], tl.float32)
        biases_grad = tl.zeros([KEYS], tl.float32)
        for head in range(kv_head * group, (kv_head + 1) * group):
            row = (batch * heads + head).to(tl.int64)
            queries = query + batch.to(tl.int64) * query_batch + head * tl.cast(query_head, tl.int64)
            outputs_grad = output_grad + batch.to(tl.int64) * output_batch + head * tl.cast(output_head, tl.int64)
            keys_grad, values_grad, biases_grad = _key_gradients_of_blocks(
                keys_grad, values_grad, biases_grad, keys, values, biases, expiries, first_key, queries, outputs_grad,
                log_sum + row * seq, delta + row * seq, diagonal, below,
                query_token, output_token, seq, exponent,
                QUERIES, KEYS, HEAD_DIM, True, EXPIRES, RAGGED, PRECISION,
            )  # fmt: skip
            keys_grad, values_grad, biases_grad = _key_gradients_of_blocks(
                keys_grad, values_grad, biases_grad, keys, values, biases, expiries, first_key, queries, outputs_grad,
                log_sum + row * seq, delta + row * seq, below, whole,
                query_token, output_token, seq, exponent,
                QUERIES, KEYS, HEAD_DIM, False, False, RAGGED, PRECISION,
            )  # fmt: skip
            if EXPIRES:
                keys_grad, values_grad, biases_grad = _key_gradients_of_blocks(
                    keys_grad, values_grad, biases_grad, keys, values, biases, expiries, first_key, queries,
                    outputs_grad, log_sum + row * seq, delta + row * seq, whole, last,
                    query_token, output_token, seq, exponent,
                    QUERIES, KEYS, HEAD_DIM, False, True, RAGGED, PRECISION,
                )  # fmt: skip

        key_grad = _head(key_grad, batch, kv_head, key_grad_batch, key_grad_head)
        _store_rows(key_grad, keys_grad * scale, first_key, key_grad_token, seq, KEYS, HEAD_DIM, RAGGED)
        value_grad = _head(value_grad, batch, kv_head, value_grad_batch, value_grad_head)
        _store_rows(value_grad, values_grad, first_key, value_grad_token, seq, KEYS, HEAD_DIM, RAGGED)
        bias_grad = _head(bias_grad, batch, kv_head, bias_grad_batch, bias_grad_head)
        tl.store(bias_grad + j.to(tl.int64) * bias_grad_token, biases_grad, mask=j < seq)
