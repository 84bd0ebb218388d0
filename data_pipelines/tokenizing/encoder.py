"""Texts to token ids, with special tokens that no text can spell.

gigatoken encodes byte-level BPE about fifty times faster per core than `tokenizers`, and returns arrays. It is trusted
only as far as it agrees: each call, that is each part of a file, compares a sample of its texts, and some that are hard
to encode. After the first difference it uses `tokenizers`, as it does where gigatoken is not installed or cannot read
the tokenizer.
"""

import json
import logging
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.tokenizing.packing import Ragged, token_dtype
from doge.tokenizer.loading import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512  # texts that `tokenizers` encodes at a time
SAMPLE, SAMPLE_CHARACTERS = 32, 1000  # pieces of texts that are compared, and their length
HARD = (
    " ", "  two  spaces ", "a\n\n\n b\r\n\tc", "I'LL we'Ve DON'T", "0123456789 12,345.67", "a\x00b\x7f\ufeffc",
    "\u00c9 e\u0301 \ufb01 \u2167 \u00bd \u2460 \u00a0\u200b\u3000|", "\U0001f415\u200d\U0001f9ba",
    "日本語のテキスト。한국어 ไทย العربية हिन्दी", "x" * 300 + "=" * 300 + " " * 300,
)  # fmt: skip

_log = logging.getLogger(__name__)


class Encoder:
    """Encodes with a tokenizer, so that what looks like a special token in a text is encoded as text.

    Here the special tokens have other names, which hold a number that is drawn when the process starts and which
    therefore no text holds. Whoever means a special token writes its name into the text.

    Attributes:
        dtype: the smallest type that holds all ids of the tokenizer.
        names: the name of each special token.
        special: matches the special tokens as they are spelled in the tokenizer.
        border: name of a token without an id: the texts before and after it are encoded apart.
        fast: gigatoken's tokenizer, or None.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        from tokenizers import AddedToken, Tokenizer

        self.dtype = token_dtype(vocabulary_size(tokenizer))
        secret = secrets.randbelow(10**18)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = [token.content for token in added.values() if token.special and token.content]
        self.names = {content: f"<{secret}.{number}>" for number, content in enumerate(special)}
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.border = f"<{secret}>"
        copies = [
            AddedToken(
                self.names.get(token.content, token.content), single_word=token.single_word, lstrip=token.lstrip,
                rstrip=token.rstrip, normalized=token.normalized, special=token.special,
            )
            for token in added.values()
        ]  # fmt: skip
        border = AddedToken(self.border, normalized=False, special=True)
        config = json.loads(tokenizer.backend_tokenizer.to_str())
        config["added_tokens"] = []
        config["model"]["vocab"] = _without_spellings(config["model"], self.names)
        if isinstance(config["model"]["vocab"], dict):  # its ids may have holes: `add_tokens` could take one twice
            vocabulary = config["model"]["vocab"]
            for number, token in enumerate([*copies, border], max(vocabulary.values(), default=-1) + 1):
                vocabulary.setdefault(token.content, number)
        self._backend = Tokenizer.from_str(json.dumps(config))
        self._backend.add_tokens([*copies, border])
        ids = np.arange(max(self._backend.get_vocab().values()) + 1)
        for copy, number in zip(copies, added, strict=True):
            ids[self._backend.token_to_id(copy.content)] = number
        self._ids = ids.astype(self.dtype)
        self.fast = _gigatoken(self._backend.to_str())

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Encode each text, without BOS and EOS."""
        found = self._encode(texts)
        return Ragged(self._ids[found.values], found.lengths)

    def encode_bordered(self, texts: Sequence[str]) -> Ragged:
        """Encode texts with an even number of borders: between the first and second, and so on, tokens are trained."""
        found = self._encode(texts)
        border = found.values == self._backend.token_to_id(self.border)
        borders = np.append(0, np.cumsum(border))
        ends = np.cumsum(found.lengths)
        lengths = found.lengths - (borders[ends] - borders[ends - found.lengths])
        return Ragged(self._ids[found.values[~border]], lengths, (borders[1:] % 2 == 1)[~border])

    def _encode(self, texts: Sequence[str]) -> Ragged:
        if self.fast is not None and texts:
            try:
                if self.agrees(texts):
                    return _with_gigatoken(self.fast, texts)
                _say("gigatoken does not agree with tokenizers: this file is encoded without it, more slowly.")
            except Exception as error:  # it documents none
                _say(
                    f"gigatoken failed ({type(error).__name__}: {error}): this file is encoded without it, more slowly."
                )
        return self._with_tokenizers(texts)

    def agrees(self, texts: Sequence[str]) -> bool:
        """Compare both on hard texts and a piece each of texts from the first to the last, ever later in them."""
        chosen = [texts[at * len(texts) // SAMPLE] for at in range(SAMPLE)]
        starts = [max(0, len(text) - SAMPLE_CHARACTERS) * at // (SAMPLE - 1) for at, text in enumerate(chosen)]
        sample = [text[start : start + SAMPLE_CHARACTERS] for text, start in zip(chosen, starts, strict=True)]
        theirs, ours = _with_gigatoken(self.fast, [*sample, *HARD]), self._with_tokenizers([*sample, *HARD])
        return np.array_equal(theirs.lengths, ours.lengths) and np.array_equal(theirs.values, ours.values)

    def _with_tokenizers(self, texts: Sequence[str]) -> Ragged:
        found = [np.empty(0, np.uint32)]
        for at in range(0, len(texts), BATCH):
            encodings = self._backend.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)
            found += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return Ragged(np.concatenate(found), np.array([len(ids) for ids in found[1:]], np.int64))


@lru_cache(maxsize=4)
def encoder_of(tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    """The encoder of a tokenizer, made once."""
    return Encoder(tokenizer)


def _without_spellings(model: dict[str, Any], names: dict[str, str]) -> Any:
    """A model's vocabulary with the names of special tokens, where text that spells one would otherwise become it.

    A token that ordinary text needs (a character, a byte, the result of a merge, the unknown word) keeps its entry.
    """
    needed = {"".join(pair) for pair in model.get("merges", ())} | {model.get("unk_token")}
    if model.get("byte_fallback"):
        needed |= {f"<0x{byte:02X}>" for byte in range(256)}
    renamed = {content: name for content, name in names.items() if len(content) > 1 and content not in needed}
    if isinstance(model["vocab"], dict):
        return {renamed.get(content, content): number for content, number in model["vocab"].items()}
    return [[renamed.get(content, content), score] for content, score in model["vocab"]]


def _gigatoken(config: str) -> Any:
    """Open a tokenizer.json with gigatoken; None where that is not installed or cannot read it."""
    try:
        from gigatoken import Tokenizer

        return Tokenizer.from_json(config)
    except ImportError:
        return None
    except Exception as error:  # a layout it does not know
        reason = " ".join(str(error).split())[:200]
        _say(f"gigatoken cannot read this tokenizer ({reason}): files are encoded without it, more slowly.")
        return None


def _with_gigatoken(fast: Any, texts: Sequence[str]) -> Ragged:
    layout = fast.encode_batch(list(texts), parallel=False).layout  # awkward's: one array of all ids, one of offsets
    offsets = np.asarray(layout.offsets.data)
    return Ragged(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    """Warn once per process."""
    _log.warning(message)
