import math

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from doge.evaluation.bits_per_byte import bits_per_byte, count_text, token_bytes
from doge.tokenizer.training import train_tokenizer

TEXTS = ["Größe zählt: 3 × 7 = 21.", "naïve café, 東京タワー", "plain words and numbers 12345\n\n", "🙂🙃 done"]


def metaspace() -> PreTrainedTokenizerFast:
    pieces = ["\u2581", "▁the", "a", "b", "c", "é", "▁東", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [train_tokenizer(TEXTS * 3, 300), metaspace()], ids=["bytes", "metaspace"])
def test_the_tokens_of_a_text_stand_for_its_bytes(tokenizer):
    sizes = token_bytes(tokenizer)
    assert len(sizes) == max(tokenizer.get_vocab().values()) + 1
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_an_added_token_that_is_text_counts_its_bytes():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens([AddedToken("→→")])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("→→")] == 6


def test_only_predicted_tokens_count():
    sizes = np.array([0, 3, 5])
    labels = [np.array([[-100, 1, 2], [-100, -100, 0]]), np.array([[-100, 2, 2]])]
    assert count_text(labels, sizes) == (5, 3 + 5 + 5 + 5)


def test_a_uniform_guess_over_bytes_takes_eight_bits():
    assert bits_per_byte(math.log(256), tokens=10, text_bytes=10) == pytest.approx(8)
    assert bits_per_byte(2.0, tokens=10, text_bytes=40) == pytest.approx(0.5 / math.log(2))
