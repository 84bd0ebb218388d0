"""Opening a tokenizer, checking that it fits a model, and its fingerprint."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge.common.errors import UserError
from doge.common.git_lfs import refuse_pointer
from doge.common.paths import plain_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    """Open the tokenizer in a directory or on the hub.

    A tokenizer.json may say how to cut, fill or vary texts. None of it is kept: a text's ids depend on the text alone.

    Raises:
        UserError: The tokenizer cannot be opened, is not a fast one or has no EOS.
    """
    from transformers import PreTrainedTokenizerFast

    path = plain_path(path)
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith(("/", "./", "../"))):
        raise UserError(
            f"The tokenizer {path!r} is no directory: point --tokenizer.path at one that holds tokenizer.json, or "
            "leave it out to train a tokenizer."
        )
    with suppress(OSError):  # a tokenizer of the hub, or one without the file
        refuse_pointer(Path(path, "tokenizer.json"))
    try:
        opener: Any = PreTrainedTokenizerFast if _is_plain(path) else _auto_tokenizer()
        tokenizer: PreTrainedTokenizerFast = opener.from_pretrained(path)
    except Exception as error:  # the hub's and the parsers' errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The tokenizer {path!r} cannot be opened ({type(error).__name__}: {reason}): without internet, point "
            "--tokenizer.path at a local directory that holds tokenizer.json, or leave it out to train a tokenizer."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer {path!r} has no tokenizer.json (a fast tokenizer is needed): choose another.")
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id == tokenizer.unk_token_id:
        raise UserError(f"The tokenizer {path!r} has no eos_token of its own: set one in its tokenizer_config.json.")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return tokenizer


def _is_plain(path: str) -> bool:
    """Whether AutoTokenizer would open a directory as PreTrainedTokenizerFast, which works without importing torch."""
    try:
        config = json.loads(Path(path, "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    named = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return named and "auto_map" not in config and not Path(path, "config.json").exists()


def _auto_tokenizer() -> type:
    from transformers import AutoTokenizer

    return AutoTokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id and one, which is what a model needs; more than ``len(tokenizer)`` where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raise UserError if the tokenizer has an id that a model of ``vocab_size`` has not."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"The tokenizer's ids go up to {needed - 1:,}, which needs more than the model's vocab_size "
            f"{vocab_size:,}: set --model.vocab-size {needed} or choose another tokenizer."
        )


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hex sha256 of everything that decides a document's ids: tokenizer.json, chat template and special ids."""
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    content = "\x00".join((tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(specials)))
    return hashlib.sha256(content.encode()).hexdigest()
