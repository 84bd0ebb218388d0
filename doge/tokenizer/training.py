"""Training a tokenizer: byte-level BPE with Llama 3's pre-tokenization."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from doge.common.errors import UserError
from doge.tokenizer.chat_template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Llama 3's split: contractions, words with one leading non-letter, up to three digits, punctuation runs, whitespace.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LONGEST_WORD = 100  # characters; a longer word is data (DNA, base64, a drawn line), and takes a trainer very long


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer turns the text into ids.

    Args:
        path: Directory or hub id of a tokenizer; ``None`` trains one on the recipe's own sources.
        vocab_size: Number of ids of a trained tokenizer, special tokens included.
        training_bytes: Approximate bytes of text that a tokenizer is trained on, of each source as much as its weight
            says. A source that holds less leaves its rest to the others.
    """

    path: str | None = None
    vocab_size: int = 32768
    training_bytes: int = 200_000_000

    def __post_init__(self) -> None:
        smallest = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}, but the 256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens alone need {smallest}: raise it."
            )
        if self.training_bytes < 1:
            raise UserError(f"tokenizer.training_bytes must be positive, not {self.training_bytes}.")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 32768) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE on ``texts``; the same texts give the same tokenizer.

    A small corpus may give fewer than ``vocab_size`` ids, never more. Of a word it sees the first `LONGEST_WORD`
    characters. Encoding adds BOS in front, as Llama 3 does; the chat template writes its own BOS, and
    data_pipelines/tokenizing/encoding.py puts BOS and EOS around each document.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rest = pre_tokenizers.Split(Regex(rf"(?<=[\s\S]{{{LONGEST_WORD}}})[\s\S]+"), behavior="removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, rest, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
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
