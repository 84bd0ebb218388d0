"""Documents to token ids: the whole cost of preparing text.

gigatoken encodes byte-level BPE about fifty times faster per core than `tokenizers`, and returns arrays. It is trusted
only as far as it agrees: each call, that is each part of a file, compares a sample of its documents, and uses
`tokenizers` after the first difference, as it does where gigatoken is not installed or cannot read the tokenizer.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.formats.base import Document, Turn
from data_pipelines.tokenizing.packing import Ragged, ragged, token_dtype
from doge.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512  # documents that `tokenizers` encodes at a time
SAMPLE, SAMPLE_CHARACTERS = 32, 1000  # pieces of documents that are compared, and their length

_log = logging.getLogger(__name__)


def tokenize(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]) -> Ragged:
    """Encode documents, each from BOS (if there is one) to EOS; a document without text has no tokens.

    The chat template puts both around a conversation. What looks like a special token in plain text is encoded as text.
    All documents are of one kind.

    Raises:
        UserError: a conversation has untrained messages, which cannot be told apart in what the chat template makes.
    """
    dtype = token_dtype(len(tokenizer))
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) == len(documents):
        encoded = _encode(tokenizer, texts, special=False)
        return _enclose(encoded, tokenizer.bos_token_id, tokenizer.eos_token_id, dtype)
    conversations = [document for document in documents if not isinstance(document, str)]
    if not all(message.trained for conversation in conversations for message in conversation):
        return _encode_partly_trained(tokenizer, conversations, dtype)
    encoded = _encode(tokenizer, [_render(tokenizer, conversation) for conversation in conversations], special=True)
    return Ragged(encoded.values.astype(dtype, copy=False), encoded.lengths)


def _encode_partly_trained(
    tokenizer: "PreTrainedTokenizerFast",
    conversations: Sequence[tuple[Turn, ...]],
    dtype: type[np.unsignedinteger],
) -> Ragged:
    """Encode conversations with the mask of the tokens that lie in trained messages; needs offsets, so slower."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    ids, trained = [], [np.empty(0, bool)]
    for conversation in conversations:
        encoding = backend.encode(_render(tokenizer, conversation), add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        ids.append(np.array(encoding.ids, dtype))
        trained.append(np.zeros(len(starts), bool))
        for begin, end in _trained_spans(tokenizer, conversation):
            trained[-1] |= (begin <= starts) & (starts < end)
    encoded = ragged(ids)
    return Ragged(encoded.values.astype(dtype, copy=False), encoded.lengths, np.concatenate(trained))


def _trained_spans(tokenizer: "PreTrainedTokenizerFast", conversation: tuple[Turn, ...]) -> Iterator[tuple[int, int]]:
    """Where the trained messages lie in the rendered text; an answer begins after the header that prompts for it."""
    whole = _render(tokenizer, conversation)
    for at, message in enumerate(conversation):
        if message.trained and whole:
            before = _render(tokenizer, conversation[:at], prompt=message.role == "assistant")
            after = _render(tokenizer, conversation[: at + 1])
            if not (whole.startswith(before) and whole.startswith(after)):
                raise UserError(
                    "The tokenizer's chat template renders a message otherwise when others follow it, so the tokens "
                    "of untrained messages cannot be told: set --tokenizer.path to another tokenizer."
                )
            yield len(before), len(after)


def _enclose(documents: Ragged, bos: int | None, eos: int, dtype: type[np.unsignedinteger]) -> Ragged:
    """Put BOS, if there is one, and EOS around every document that is not empty."""
    full = documents.lengths > 0
    lengths = documents.lengths + full * (1 if bos is None else 2)
    ends = np.cumsum(lengths)[full]
    values = np.empty(int(lengths.sum()), dtype)
    inner = np.ones(len(values), bool)
    inner[ends - 1] = False
    values[ends - 1] = eos
    if bos is not None:
        starts = ends - lengths[full]
        inner[starts] = False
        values[starts] = bos
    values[inner] = documents.values
    return Ragged(values, lengths)


def _render(tokenizer: "PreTrainedTokenizerFast", conversation: tuple[Turn, ...], prompt: bool = False) -> str:
    if not any(message.content for message in conversation):
        return ""
    turns = [{"role": message.role, "content": message.content} for message in conversation]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], special: bool) -> Ragged:
    """Encode each text; ``special`` says whether the text of a special token becomes that token."""
    fast = _gigatoken(tokenizer, special) if texts else None
    if fast is not None:
        try:
            if _agree(fast, tokenizer, texts, special):
                return _with_gigatoken(fast, texts)
            _say("gigatoken does not agree with tokenizers: this file is encoded without it, more slowly.")
        except Exception as error:  # it documents none
            _say(f"gigatoken failed ({type(error).__name__}: {error}): this file is encoded without it, more slowly.")
    return _with_tokenizers(tokenizer, texts, special)


def _agree(fast: Any, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], special: bool) -> bool:
    """Compare the ids of a sample: one piece each of documents from the first to the last, ever later in them."""
    chosen = [texts[at * len(texts) // SAMPLE] for at in range(SAMPLE)]
    starts = [max(0, len(text) - SAMPLE_CHARACTERS) * at // (SAMPLE - 1) for at, text in enumerate(chosen)]
    sample = [text[start : start + SAMPLE_CHARACTERS] for text, start in zip(chosen, starts, strict=True)]
    theirs, ours = _with_gigatoken(fast, sample), _with_tokenizers(tokenizer, sample, special)
    return np.array_equal(theirs.lengths, ours.lengths) and np.array_equal(theirs.values, ours.values)


def _with_gigatoken(fast: Any, texts: Sequence[str]) -> Ragged:
    layout = fast.encode_batch(list(texts), parallel=False).layout  # awkward's: one array of all ids, one of offsets
    offsets = np.asarray(layout.offsets.data)
    return Ragged(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))


def _with_tokenizers(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], special: bool) -> Ragged:
    backend, dtype = tokenizer.backend_tokenizer, token_dtype(len(tokenizer))
    backend.encode_special_tokens = not special
    found = [np.empty(0, dtype)]
    for at in range(0, len(texts), BATCH):
        encodings = backend.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)
        found += [np.array(encoding.ids, dtype) for encoding in encodings]
    return Ragged(np.concatenate(found), np.array([len(ids) for ids in found[1:]], np.int64))


@lru_cache(maxsize=4)
def _gigatoken(tokenizer: "PreTrainedTokenizerFast", special: bool) -> Any:
    """Open a tokenizer with gigatoken; None where that is not installed or cannot read it."""
    try:
        from gigatoken import Tokenizer

        config = json.loads(tokenizer.backend_tokenizer.to_str())
        if not special:
            config["added_tokens"] = [token for token in config["added_tokens"] if not token["special"]]
        return Tokenizer.from_json(json.dumps(config))
    except ImportError:
        return None
    except Exception as error:  # a layout it does not know
        _say(f"gigatoken cannot read this tokenizer ({error}): files are encoded without it, more slowly.")
        return None


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    """Warn once per process."""
    _log.warning(message)
