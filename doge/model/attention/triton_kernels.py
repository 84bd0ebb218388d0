"""The Triton kernels of `triton_attention`: attention and its gradients, one block at a time."""

import triton
import triton.language as tl

from doge.model.attention.triton_tiles import LOG2_E, document_blocks, head_of, load_rows, scores_of, store_rows

LEAST_SCORE = tl.constexpr(-1e29)  # above PADDED_KEY_BIAS, so that a padded key weighs nothing


@triton.jit
def fill_lists(expiry, lists, counts, seq, key_blocks, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr):
    """`list_key_blocks` for one block of queries and one kv head, CHUNK blocks of keys at a time."""
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
def _attend_to_blocks(
    total, row_max, row_sum, query, key_head, value_head, bias_head, expiry_head, blocks, first, last,
    first_query, key_stride, value_stride, bias_stride, seq, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
    EXPIRES: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add key blocks `first` to `last`, or those that `blocks` lists there, to the running softmax."""
    for index in range(first, last):
        block = tl.load(blocks + index) if LISTED else index
        start = block * KEYS
        scores, _ = scores_of(
            query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
            QUERIES, KEYS, HEAD_DIM, CAUSAL, EXPIRES, CHECK, PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        value = load_rows(value_head, start, value_stride, seq, KEYS, HEAD_DIM, CHECK)
        total = tl.dot(weights.to(value.dtype), value, total * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return total, row_max, row_sum


@triton.jit
def attend(
    query, key, value, bias, expiry, lists, counts, output, log_sum,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    bias_batch, bias_head, bias_token, expiry_batch, expiry_head, output_batch, output_head, output_token,
    heads, kv_heads, seq, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EXPIRES: tl.constexpr, LISTED: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of one block of queries of one head, and the base-2 logarithms of the sums of its weights."""
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    key = head_of(key, batch, kv_head, key_batch, key_head)
    value = head_of(value, batch, kv_head, value_batch, value_head)
    bias = head_of(bias, batch, kv_head, bias_batch, bias_head)
    first_query = query_block * QUERIES
    query = head_of(query, batch, head, query_batch, query_head)
    query = load_rows(query, first_query, query_token, seq, QUERIES, HEAD_DIM, RAGGED)
    scale = scale * LOG2_E

    total = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    maximum = tl.full([QUERIES], LEAST_SCORE, tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    diagonal = first_query // KEYS
    whole, whole_end = 0, diagonal  # blocks that need no mask, or where the lists have them
    if EXPIRES:
        expiry = head_of(expiry, batch, kv_head, expiry_batch, expiry_head)
        if LISTED:
            key_blocks = tl.cdiv(seq, KEYS)
            row = (batch.to(tl.int64) * kv_heads + kv_head) * tl.num_programs(0) + query_block
            lists += row * key_blocks
            partial, partial_end = key_blocks - tl.load(counts + row * 2 + 1), key_blocks
            whole_end = tl.load(counts + row * 2)
        else:
            partial, whole = document_blocks(expiry, first_query, seq, QUERIES, KEYS)
            partial_end = whole
        total, maximum, row_sum = _attend_to_blocks(
            total, maximum, row_sum, query, key, value, bias, expiry, lists, partial, partial_end,
            first_query, key_token, value_token, bias_token, seq, scale,
            QUERIES, KEYS, HEAD_DIM, LISTED, False, True, False, PRECISION,
        )  # fmt: skip
    total, maximum, row_sum = _attend_to_blocks(
        total, maximum, row_sum, query, key, value, bias, expiry, lists, whole, whole_end,
        first_query, key_token, value_token, bias_token, seq, scale,
        QUERIES, KEYS, HEAD_DIM, LISTED, False, False, False, PRECISION,
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
    output = head_of(output, batch, head, output_batch, output_head)
    store_rows(output, total, first_query, output_token, seq, QUERIES, HEAD_DIM, RAGGED)
    rows = tl.program_id(1).to(tl.int64) * seq + i
    # With an infinite sum, the backward pass recomputes weights of zero.
    tl.store(log_sum + rows, tl.where(seen, maximum + tl.log2(row_sum), float("inf")), mask=i < seq)


@triton.jit
def sum_output_products(
    output, output_grad, delta, output_batch, output_head, output_token, grad_batch, grad_head, grad_token,
    heads, seq, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta (batch, heads, seq): the products of the output and its gradient, summed over the channels."""
    start = tl.program_id(0) * BLOCK
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    output = head_of(output, batch, head, output_batch, output_head)
    output_grad = head_of(output_grad, batch, head, grad_batch, grad_head)
    outputs = load_rows(output, start, output_token, seq, BLOCK, HEAD_DIM, True).to(tl.float32)
    grads = load_rows(output_grad, start, grad_token, seq, BLOCK, HEAD_DIM, True).to(tl.float32)
    i = start + tl.arange(0, BLOCK)
    tl.store(delta + tl.program_id(1).to(tl.int64) * seq + i, tl.sum(outputs * grads, 1), mask=i < seq)


@triton.jit
def _query_gradient_of_blocks(
    query_grad, query, output_grad, log_sum, delta, key_head, value_head, bias_head, expiry_head, blocks,
    first, last, first_query, key_stride, value_stride, bias_stride, seq, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
    EXPIRES: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradient the parts of key blocks `first` to `last`, or of those that `blocks` lists there."""
    for index in range(first, last):
        block = tl.load(blocks + index) if LISTED else index
        start = block * KEYS
        value = load_rows(value_head, start, value_stride, seq, KEYS, HEAD_DIM, CHECK)
        scores, key = scores_of(
            query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
            QUERIES, KEYS, HEAD_DIM, CAUSAL, EXPIRES, CHECK, PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - log_sum[:, None])
        weight_grad = tl.dot(output_grad, tl.trans(value), input_precision=PRECISION)
        score_grad = weights * (weight_grad - delta[:, None])
        query_grad = tl.dot(score_grad.to(key.dtype), key, query_grad, input_precision=PRECISION)
    return query_grad


@triton.jit
def differentiate_query(
    query, key, value, bias, expiry, output_grad, log_sum, delta, lists, counts, query_grad,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    bias_batch, bias_head, bias_token, expiry_batch, expiry_head, output_batch, output_head, output_token,
    query_grad_batch, query_grad_head, query_grad_token, heads, kv_heads, seq, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EXPIRES: tl.constexpr, LISTED: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head."""
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    key = head_of(key, batch, kv_head, key_batch, key_head)
    value = head_of(value, batch, kv_head, value_batch, value_head)
    bias = head_of(bias, batch, kv_head, bias_batch, bias_head)
    first_query = query_block * QUERIES
    query = head_of(query, batch, head, query_batch, query_head)
    query = load_rows(query, first_query, query_token, seq, QUERIES, HEAD_DIM, RAGGED)
    output_grad = head_of(output_grad, batch, head, output_batch, output_head)
    output_grad = load_rows(output_grad, first_query, output_token, seq, QUERIES, HEAD_DIM, RAGGED)
    i = first_query + tl.arange(0, QUERIES)
    rows = tl.program_id(1).to(tl.int64) * seq + i
    log_sum = tl.load(log_sum + rows, mask=i < seq, other=float("inf"))
    delta = tl.load(delta + rows, mask=i < seq, other=0.0)
    exponent = scale * LOG2_E

    gradient = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    diagonal = first_query // KEYS
    whole, whole_end = 0, diagonal  # blocks that need no mask, or where the lists have them
    if EXPIRES:
        expiry = head_of(expiry, batch, kv_head, expiry_batch, expiry_head)
        if LISTED:
            key_blocks = tl.cdiv(seq, KEYS)
            row = (batch.to(tl.int64) * kv_heads + kv_head) * tl.num_programs(0) + query_block
            lists += row * key_blocks
            partial, partial_end = key_blocks - tl.load(counts + row * 2 + 1), key_blocks
            whole_end = tl.load(counts + row * 2)
        else:
            partial, whole = document_blocks(expiry, first_query, seq, QUERIES, KEYS)
            partial_end = whole
        gradient = _query_gradient_of_blocks(
            gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
            partial, partial_end, first_query, key_token, value_token, bias_token, seq, exponent,
            QUERIES, KEYS, HEAD_DIM, LISTED, False, True, False, PRECISION,
        )  # fmt: skip
    gradient = _query_gradient_of_blocks(
        gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
        whole, whole_end, first_query, key_token, value_token, bias_token, seq, exponent,
        QUERIES, KEYS, HEAD_DIM, LISTED, False, False, False, PRECISION,
    )  # fmt: skip
    last = tl.cdiv(tl.minimum(first_query + QUERIES, seq), KEYS)
    gradient = _query_gradient_of_blocks(
        gradient, query, output_grad, log_sum, delta, key, value, bias, expiry, lists,
        diagonal, last, first_query, key_token, value_token, bias_token, seq, exponent,
        QUERIES, KEYS, HEAD_DIM, False, True, EXPIRES, RAGGED, PRECISION,
    )  # fmt: skip
    query_grad = head_of(query_grad, batch, head, query_grad_batch, query_grad_head)
    store_rows(query_grad, gradient * scale, first_query, query_grad_token, seq, QUERIES, HEAD_DIM, RAGGED)


@triton.jit
def _key_gradients_of_blocks(
    key_grad, value_grad, bias_grad, key, value, bias, expiry, first_key, query_head, output_grad_head,
    log_sum, delta, first, last, query_stride, output_stride, seq, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    EXPIRES: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the parts of query blocks `first` to `last` to a block of keys' gradients; tiles are keys x queries."""
    for block in range(first, last):
        start = block * QUERIES
        i = start + tl.arange(0, QUERIES)
        query = load_rows(query_head, start, query_stride, seq, QUERIES, HEAD_DIM, RAGGED)
        output_grad = load_rows(output_grad_head, start, output_stride, seq, QUERIES, HEAD_DIM, RAGGED)
        if RAGGED:
            logarithm = tl.load(log_sum + i, mask=i < seq, other=float("inf"))
            products = tl.load(delta + i, mask=i < seq, other=0.0)
        else:
            logarithm = tl.load(log_sum + i)
            products = tl.load(delta + i)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale + bias[:, None]
        # Masked before the exponential: a key that a query does not see may have a bias far above those that it sees.
        if CAUSAL:
            j = first_key + tl.arange(0, KEYS)
            scores = tl.where(j[:, None] <= i[None, :], scores, float("-inf"))
        if EXPIRES:
            scores = tl.where(i[None, :] < expiry[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - logarithm[None, :])
        value_grad = tl.dot(weights.to(output_grad.dtype), output_grad, value_grad, input_precision=PRECISION)
        weight_grad = tl.dot(value, tl.trans(output_grad), input_precision=PRECISION)
        score_grad = weights * (weight_grad - products[None, :])
        key_grad = tl.dot(score_grad.to(query.dtype), query, key_grad, input_precision=PRECISION)
        bias_grad += tl.sum(score_grad, 1)
    return key_grad, value_grad, bias_grad


@triton.jit
def differentiate_key(
    query, key, value, bias, expiry, output_grad, log_sum, delta, key_grad, value_grad, bias_grad,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    bias_batch, bias_head, bias_token, expiry_batch, expiry_head, output_batch, output_head, output_token,
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
    key = head_of(key, batch, kv_head, key_batch, key_head)
    keys = load_rows(key, first_key, key_token, seq, KEYS, HEAD_DIM, RAGGED)
    value = head_of(value, batch, kv_head, value_batch, value_head)
    values = load_rows(value, first_key, value_token, seq, KEYS, HEAD_DIM, RAGGED)
    bias = head_of(bias, batch, kv_head, bias_batch, bias_head)
    biases = tl.load(bias + j.to(tl.int64) * bias_token, mask=j < seq, other=0.0) * LOG2_E
    exponent = scale * LOG2_E

    # Query blocks: `diagonal` to `below` are masked by causality, and all to `last` by expiry.
    diagonal = first_key // QUERIES
    last = tl.cdiv(seq, QUERIES)
    below = tl.minimum(tl.cdiv(first_key + KEYS - 1, QUERIES), last)
    expiries = j
    if EXPIRES:
        expiry = head_of(expiry, batch, kv_head, expiry_batch, expiry_head)
        expiries = tl.load(expiry + j, mask=j < seq, other=0).to(tl.int32)
        last = tl.minimum(tl.cdiv(tl.max(expiries, 0), QUERIES), last)
        below = tl.minimum(below, last)

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
            log_sum + row * seq, delta + row * seq, below, last,
            query_token, output_token, seq, exponent,
            QUERIES, KEYS, HEAD_DIM, False, EXPIRES, RAGGED, PRECISION,
        )  # fmt: skip

    key_grad = head_of(key_grad, batch, kv_head, key_grad_batch, key_grad_head)
    store_rows(key_grad, keys_grad * scale, first_key, key_grad_token, seq, KEYS, HEAD_DIM, RAGGED)
    value_grad = head_of(value_grad, batch, kv_head, value_grad_batch, value_grad_head)
    store_rows(value_grad, values_grad, first_key, value_grad_token, seq, KEYS, HEAD_DIM, RAGGED)
    bias_grad = head_of(bias_grad, batch, kv_head, bias_grad_batch, bias_grad_head)
    tl.store(bias_grad + j.to(tl.int64) * bias_grad_token, biases_grad, mask=j < seq)
