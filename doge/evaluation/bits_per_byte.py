"""Bits per byte: a loss that models with different tokenizers can be compared by."""

import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> npt.NDArray[np.int64]:
    """UTF-8 bytes of text that each id stands for, (largest id + 1,); special tokens stand for none.

    Exact for byte-level tokenizers and for those that spell a space as ``\u2581``, with or without byte fallback.
    """
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
    added = {token["id"]: token for token in content["added_tokens"]}
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, at in vocabulary.items():
        if at in added:
            sizes[at] = 0 if added[at]["special"] else len(token.encode())
        elif byte_level:
            sizes[at] = len(token)  # a character stands for a byte
        elif _BYTE.fullmatch(token):
            sizes[at] = 1
        else:
            sizes[at] = len(token.replace("\u2581", " ").removeprefix("##").encode())
    return sizes


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Convert a mean loss over ``tokens``, which together stand for ``text_bytes`` bytes of text."""
    return nats_per_token * tokens / (math.log(2) * text_bytes)


def count_text(labels: Iterable[npt.NDArray[np.integer[Any]]], sizes: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Tokens that a loss covers and the bytes of text that they stand for.

    Args:
        labels: arrays of shape (sequences, sequence_length), -100 where nothing is predicted.
        sizes: of `token_bytes`.
    """
    tokens = text_bytes = 0
    for found in labels:
        predicted = found[found != -100]
        tokens += predicted.size
        text_bytes += int(sizes[predicted].sum())
    return tokens, text_bytes
