"""The tokenizer: byte-level BPE with Llama-3 pre-tokenization, trained, loaded and fingerprinted."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from doge.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_thought|>",
    "<|end_of_thought|>",
    "<|begin_of_solution|>",
    "<|end_of_solution|>",
)  # the position is the id

# Llama 3's split: contractions, words with one leading non-letter, up to three digits, punctuation runs, whitespace.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every turn closes with EOS, as in the published Doge-tokenizer. The assistant's EOS lies inside its generation block,
# so that assistant-only losses teach the model to stop.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- ('\\n\\n' if messages else '') + '<|start_header_id|>assistant<|end_header_id|>\\n' -}}"
    "{%- endif -%}"
)


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer turns the text into ids.

    Args:
        path: a directory or hub id; ``None`` trains one on the recipe's own sources.
        vocab_size: ids of a trained tokenizer, special tokens included.
        training_bytes: about how many bytes of text to train one on, as many from every source.
    """

    path: str | None = None
    vocab_size: int = 32768
    training_bytes: int = 200_000_000

    def __post_init__(self):
        smallest = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}, but the 256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens alone need {smallest}: raise it."
            )
        if self.training_bytes < 1:
            raise UserError(f"tokenizer.training_bytes must be positive, not {self.training_bytes}.")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 32768) -> "PreTrainedTokenizerFast":
    """Learn a byte-level BPE from ``texts``; the same texts give the same tokenizer.

    Few texts may give fewer than ``vocab_size`` ids, never more. Encoding adds BOS in front (as Llama 3 does); the
    chat template brings its own, and `tokenize` in data_pipelines/encoding.py adds BOS and EOS around each document.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    """Open the tokenizer in a directory or on the hub.

    Raises:
        UserError: it cannot be opened, is not a fast one or has no EOS.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        opener = PreTrainedTokenizerFast if _is_plain(path) else _auto_tokenizer()
        tokenizer = opener.from_pretrained(path)
    except Exception as error:  # the hub's and the parsers' errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The tokenizer {path!r} cannot be opened ({type(error).__name__}: {reason}): without internet, point "
            "--tokenizer.path at a local directory that holds tokenizer.json, or leave it out to train one."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer {path!r} has no tokenizer.json (a fast tokenizer is needed): choose another.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer {path!r} has no eos_token: set one in its tokenizer_config.json.")
    return tokenizer


def _is_plain(path: str) -> bool:
    """Whether AutoTokenizer would open a local directory as the general class, which needs no torch to be imported."""
    try:
        config = json.loads(Path(path, "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    named = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return named and "auto_map" not in config and not Path(path, "config.json").exists()


def _auto_tokenizer() -> type:
    from transformers import AutoTokenizer

    return AutoTokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raise UserError if the tokenizer has more ids than a model of ``vocab_size``."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"The tokenizer has {len(tokenizer):,} ids, more than the model's vocab_size {vocab_size:,}: "
            f"set --model.vocab-size {len(tokenizer)} or choose another tokenizer."
        )


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hex sha256 of all that decides a document's ids: tokenizer.json, chat template and special ids."""
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    content = "\x00".join((tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(specials)))
    return hashlib.sha256(content.encode()).hexdigest()
