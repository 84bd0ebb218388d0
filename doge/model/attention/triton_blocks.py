"""Block sizes of the Triton kernels, by the card, the dtype and the width of a head."""

from typing import NamedTuple

import torch


class Card(NamedTuple):
    """What of a GPU decides the block sizes.

    Args:
        architecture: Its compute capability, 89 for 8.9.
        shared_memory: Bytes that one block of threads may use.
    """

    architecture: int
    shared_memory: int


class Blocks(NamedTuple):
    """Tokens of a block of queries and of keys, warps of a block of threads, and stages of its loops' pipelines."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class KernelBlocks(NamedTuple):
    """The block sizes of the three kernels; `key`, which goes over queries for a block of keys, is the transpose."""

    attend: Blocks
    query: Blocks
    key: Blocks


LARGE_SHARED_MEMORY = 200 * 1024  # bytes; data centre GPUs since H100 have more, others (99 KiB on most cards) less


def choose_blocks(card: Card | None, dtype: torch.dtype, head_dim: int) -> KernelBlocks:
    """The block sizes for queries (..., head_dim) of this dtype; without a card, those of the interpreter."""
    if card is None or dtype == torch.float32:  # exact rather than fast
        small = Blocks(32, 32, 4, 1) if head_dim <= 128 else Blocks(16, 16, 4, 1)
        return KernelBlocks(small, small, small)
    if head_dim > 128:
        return KernelBlocks(Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
    forward = Blocks(128, 64, 8 if head_dim == 128 else 4, 3)
    if card.shared_memory >= LARGE_SHARED_MEMORY:
        return KernelBlocks(forward, Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3))
    return KernelBlocks(forward, Blocks(64, 64, forward.num_warps, 2), Blocks(64, 64, forward.num_warps, 2))
