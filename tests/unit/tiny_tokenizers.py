"""Tokenizers that are not made as this project makes its own."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [f"Every river {number} runs over its stones to the sea." for number in range(300)]


def byte_level(unusual=("<|document_end|>",), vocab_size=400) -> Tokenizer:
    """A byte-level BPE whose special tokens come after the others, as GPT-2's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in unusual])
    return backend


def with_ids(backend: Tokenizer, ids: dict[str, int]) -> Tokenizer:
    """The tokenizer with special tokens at the given ids, and every other token at twice its id."""
    config = json.loads(backend.to_str())
    config["model"]["vocab"] = {token: 2 * number for token, number in config["model"]["vocab"].items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config["added_tokens"] = [{"id": number, "content": token, **flags} for token, number in ids.items()]
    config["model"]["vocab"] |= ids
    return Tokenizer.from_str(json.dumps(config))


SPECIAL = ["<unk>", "<s>", "</s>"]


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list("</s>"), show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: every stretch between special tokens begins with a space, and unknown letters become bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    return backend


def opened(backend: Tokenizer, folder, **tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer as it comes from a directory."""
    from doge.tokenizer.loading import load_tokenizer

    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return load_tokenizer(str(folder))
