"""What the Triton kernels of `triton_attention` are made of: loads, stores, scores, and which key blocks to visit."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(1024)  # tokens of a row that are looked at together for the beginning of a document


@triton.jit
def load_rows(states, start, stride, seq, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """Load (ROWS, HEAD_DIM) from token `start` on; zero from token `seq` on if CHECK."""
    rows = tl.arange(0, ROWS)
    states += start * tl.cast(stride, tl.int64)
    pointers = states + rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    if CHECK:
        return tl.load(pointers, mask=(start + rows < seq)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(states, tile, start, stride, seq, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """The inverse of `load_rows`."""
    rows = tl.arange(0, ROWS)
    states += start * tl.cast(stride, tl.int64)
    pointers = states + rows[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tile = tile.to(states.dtype.element_ty)
    if CHECK:
        tl.store(pointers, tile, mask=(start + rows < seq)[:, None])
    else:
        tl.store(pointers, tile)


@triton.jit
def head_of(states, batch, head, batch_stride, head_stride):
    """Pointer to the start of a head in a row of the batch."""
    return states + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def scores_of(
    query, key_head, bias_head, expiry_head, start, first_query, key_stride, bias_stride, seq, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, EXPIRES: tl.constexpr,
    CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 scores (QUERIES, KEYS), minus infinity where a key is not seen; and the keys."""
    key = load_rows(key_head, start, key_stride, seq, KEYS, HEAD_DIM, CHECK)
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
            visible = i[:, None] < expiry.to(tl.int32)[None, :]
            if CAUSAL:
                visible = visible & (j[None, :] <= i[:, None])
        else:
            visible = j[None, :] <= i[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    return scores, key


@triton.jit
def document_blocks(ends, first_query, seq, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which key blocks before the diagonal a block of queries sees, where `ends` tells where tokens' documents end.

    Returns the block of the first key that any of the queries sees, and the first block that all of them see whole. A
    document begins after as many tokens as belong to documents that have ended by then.
    """
    last_query = tl.minimum(first_query + QUERIES, seq) - 1
    before_first = tl.zeros([CHUNK], tl.int32)
    before_last = tl.zeros([CHUNK], tl.int32)
    for start in range(0, last_query, CHUNK):
        j = start + tl.arange(0, CHUNK)
        end = tl.load(ends + j, mask=j < seq, other=seq)
        before_first += (end <= first_query).to(tl.int32)
        before_last += (end <= last_query).to(tl.int32)
    first = tl.sum(before_first, 0) // KEYS
    whole = tl.minimum(tl.cdiv(tl.sum(before_last, 0), KEYS), first_query // KEYS)
    return first, whole
