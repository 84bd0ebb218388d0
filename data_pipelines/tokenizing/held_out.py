"""Which documents are held out: by a hash, so that every source, file and run decides alike."""

import hashlib
from collections.abc import Sequence

import numpy as np


def held_out(groups: Sequence[str], fraction: float) -> np.ndarray:
    """Choose about ``fraction`` of all groups; documents of one group stay together.

    Args:
        groups: of each document what it shares with others: an article, a module, a repository, or its own text.
        fraction: between 0 and 1.

    Returns:
        (documents,) bool.
    """
    if fraction <= 0:
        return np.zeros(len(groups), bool)
    digests = b"".join(hashlib.blake2b(group.encode("utf-8", "replace"), digest_size=8).digest() for group in groups)
    return np.frombuffer(digests, "<u8") < np.uint64(min(fraction, 1.0) * (2**64 - 1))
