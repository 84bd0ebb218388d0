"""Pseudorandom permutations of a range that need no table."""

import hashlib
from functools import lru_cache
from math import isqrt


def permute(index: int, size: int, *key: object) -> int:
    """Map ``index`` by the pseudorandom permutation of ``range(size)`` that ``key`` chooses.

    A Feistel network over pairs of digits in base ceil(sqrt(size)), walked until it lands inside the range: no table,
    constant memory, about one round trip a call. (Black and Rogaway 2002, "Ciphers with arbitrary finite domains")

    Raises:
        IndexError: ``index`` is outside the range.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    base = _ceil_sqrt(size)
    keys = _round_keys(key)
    while True:
        left, right = divmod(index, base)
        for round_key in keys:
            left, right = right, (left + _mix(right ^ round_key)) % base
        index = left * base + right
        if index < size:
            return index


@lru_cache(maxsize=4096)
def _round_keys(key: tuple[object, ...], rounds: int = 6) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * rounds).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(rounds))


@lru_cache(maxsize=4096)
def _ceil_sqrt(size: int) -> int:
    return isqrt(size - 1) + 1


def _mix(value: int) -> int:
    """Apply the 64-bit finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def file_order(count: int, seed: int, source: str) -> list[int]:
    """Shuffle the numbers of a source's sorted files: a corpus is often sorted by date."""
    return [permute(index, count, seed, source, "files") for index in range(count)]
