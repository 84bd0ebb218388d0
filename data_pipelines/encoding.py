"""Documents to token ids: the whole cost of preparing text.

gigatoken encodes byte-level BPE some twenty times faster a core than `tokenizers` where it is installed. It is trusted
only as far as it agrees: each call compares a sample of its documents and falls back at the first difference.
"""

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.packing import token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512  # documents at a time
SAMPLE, SAMPLE_CHARACTERS = 32, 2000  # documents compared, and of each how much

_log = logging.getLogger(__name__)


def tokenize(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[str | tuple[str, str]]) -> list[np.ndarray]:
    """Token ids of documents, each from BOS (if there is one) to EOS; nothing of a document without text.

    A (prompt, text) pair goes through the chat template, which brings both. In plain text, what looks like a special
    token is text. All documents are of one kind.
    """
    dtype = token_dtype(len(tokenizer))
    if documents and isinstance(documents[0], tuple):
        texts, before, after = [_render(tokenizer, *turns) for turns in documents], [], []
        encoded = _encode(tokenizer, texts, special=True)
    else:
        before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = [tokenizer.eos_token_id]
        encoded = _encode(tokenizer, documents, special=False)
    return [np.array(before + ids + after if ids else [], dtype) for ids in encoded]


def _render(tokenizer: "PreTrainedTokenizerFast", prompt: str, text: str) -> str:
    if not prompt and not text:
        return ""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], special: bool) -> list[list[int]]:
    """Ids of each text; ``special`` says whether the text of a special token becomes that token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    fast = _gigatoken(backend.to_str(), special)
    if fast is not None:
        sample = [text[:SAMPLE_CHARACTERS] for text in texts[:SAMPLE]]
        expected = [encoding.ids for encoding in backend.encode_batch_fast(sample, add_special_tokens=False)]
        if fast.encode_batch_list(sample, parallel=False) == expected:
            return fast.encode_batch_list(list(texts), parallel=False)
        _log.warning("gigatoken does not agree with tokenizers: going on without it, more slowly.")
    batches = (texts[at : at + BATCH] for at in range(0, len(texts), BATCH))
    return [
        encoding.ids for batch in batches for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)
    ]


@lru_cache(maxsize=4)
def _gigatoken(content: str, special: bool):
    """gigatoken's reading of a tokenizer.json; None where it is not installed or cannot read it."""
    try:
        from gigatoken import Tokenizer

        config = json.loads(content)
        if not special:
            config["added_tokens"] = [token for token in config["added_tokens"] if not token["special"]]
        return Tokenizer.from_json(json.dumps(config))
    except ImportError:
        return None
    except Exception as error:  # a layout it does not know
        _log.warning("gigatoken cannot read this tokenizer (%s): going on without it, more slowly.", error)
        return None
