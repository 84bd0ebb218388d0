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


DATA_CENTRE = 160 << 10  # bytes of shared memory, which A100 and its successors have; other cards have 99 KiB
HOPPER = 90  # from this architecture on, four warps multiply together and from shared memory, which saves registers

# Of the widths in 16 bits. What stays in registers has as many tokens as they hold without spills, for as many are
# computed with each token that is loaded: `python benchmarks/gpu_blocks.py --search`. Two sums of gradients of 64 keys
# and 128 channels are the most before Hopper. Without a GPU nobody knows the times; where one is, it tells them too.
HOPPER_128 = KernelBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 3))
AMPERE_128 = KernelBlocks(Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 3), Blocks(32, 64, 8, 2))
OTHERS_128 = KernelBlocks(Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 3))
HOPPER_64 = KernelBlocks(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3))
OTHERS_64 = KernelBlocks(Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 128, 8, 3))
ANY_256 = KernelBlocks(Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 1), Blocks(32, 32, 8, 1))


def choose_blocks(card: Card | None, dtype: torch.dtype, head_dim: int) -> KernelBlocks:
    """The block sizes for queries (..., head_dim) of this dtype; without a card, those of the interpreter."""
    if card is None or dtype == torch.float32:  # exact rather than fast
        small = Blocks(32, 32, 4, 1) if head_dim <= 128 else Blocks(16, 16, 4, 1)
        return KernelBlocks(small, small, small)
    if head_dim > 128:
        return ANY_256
    data_centre = card.shared_memory >= DATA_CENTRE
    hopper = data_centre and card.architecture >= HOPPER
    if head_dim < 128:
        return HOPPER_64 if hopper else OTHERS_64
    if hopper:
        return HOPPER_128
    return AMPERE_128 if data_centre else OTHERS_128
