"""Equal texts give an equal tokenizer, with fixed special ids, that AutoTokenizer opens and TRL can mask."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipelines.formats.base import Turn
from data_pipelines.tokenizing import encoder
from data_pipelines.tokenizing.encoder import Encoder, encoder_of
from data_pipelines.tokenizing.encoding import _enclose, tokenize
from data_pipelines.tokenizing.packing import ragged
from doge.common.errors import UserError
from doge.tokenizer.chat_template import SPECIAL_TOKENS
from doge.tokenizer.loading import check_vocabulary, fingerprint, load_tokenizer
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

TEXTS = [f"The {word} of {number} is {number * 7}, isn't it?\n    return {word}" for number in range(200)
         for word in ("sum", "product", "naïve value", "größe")]  # fmt: skip
CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def turns(prompt, text):
    return Turn("user", prompt), Turn("assistant", text)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 600)


def test_equal_texts_give_an_equal_tokenizer(tokenizer):
    assert fingerprint(train_tokenizer(TEXTS, 600)) == fingerprint(tokenizer)
    assert fingerprint(train_tokenizer(TEXTS[:-300], 600)) != fingerprint(tokenizer)


def test_special_tokens_have_the_published_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 600


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(special in text for special in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == text


def test_numbers_split_into_at_most_three_digits(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("isn't 1234567")
    assert [piece for piece, _ in pieces] == ["isn", "'t", "Ġ", "123", "456", "7"]


def test_what_is_saved_opens_with_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for opened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert opened(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
        assert opened.chat_template == tokenizer.chat_template
        assert opened.pad_token_id == 2
        assert fingerprint(opened) == fingerprint(load_tokenizer(str(tmp_path)))


def test_the_chat_template_marks_the_answer_with_its_end(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Because.<|end_of_text|>"
    assert encoded["input_ids"].count(0) == 1


def test_a_generation_prompt_is_a_prefix_of_the_conversation(tokenizer):
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    prompt = tokenizer.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n")


def test_documents_have_one_bos_and_one_eos(tokenizer):
    (text, empty), (conversation,) = tokenize(tokenizer, ["a b", ""]), tokenize(tokenizer, [turns("Why?", "Because.")])
    for ids in (text, conversation):
        assert ids[0] == 0
        assert (ids == 0).sum() == 1
        assert ids[-1] == 1
    assert (text == 1).sum() == 1
    assert (conversation == 1).sum() == 2  # both turns end
    assert len(empty) == 0


def test_special_tokens_in_plain_text_are_text(tokenizer):
    (ids,) = tokenize(tokenizer, ["x<|end_of_text|>y"])
    assert (ids == 1).sum() == 1
    assert tokenizer.decode(ids[1:-1]) == "x<|end_of_text|>y"


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    ids = len(tokenizer)
    check_vocabulary(tokenizer, ids)
    with pytest.raises(UserError, match=rf"more than the model's vocab_size 100: set --model\.vocab-size {ids} or"):
        check_vocabulary(tokenizer, 100)


def test_an_unreachable_tokenizer_says_how_to_point_at_a_local_one(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer\.path"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("place", ["nowhere", "tokenizer.json", "file"])
def test_a_place_that_is_no_directory_is_not_looked_for_on_the_hub(tmp_path, place):
    (tmp_path / "tokenizer.json").write_text("{}")
    path = f"file://{tmp_path}/tokenizer.json" if place == "file" else str(tmp_path / place)
    with pytest.raises(UserError, match=r"is no directory: point --tokenizer\.path at one that holds tokenizer\.json"):
        load_tokenizer(path)


def test_a_clone_without_its_large_files_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        UserError, match=r"tokenizer\.json is a Git LFS pointer in place of the file: run `git lfs pull`"
    ):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size is 200"):
        TokenizerRecipe(vocab_size=200)


AWKWARD = ["", " ", "x<|end_of_text|>y", "naïve\u3000größe\n\n\n  12345", "I'LL\r\n we'Ve\t", "🐕🐕 ok", "a\x00b"]


def test_gigatoken_and_tokenizers_agree(tokenizer, monkeypatch):
    pairs = [turns("Why " + text, text) for text in AWKWARD]
    assert encoder_of(tokenizer).agrees(TEXTS)
    fast = [tokenize(tokenizer, documents) for documents in (TEXTS + AWKWARD, pairs)]
    monkeypatch.setattr(encoder_of(tokenizer), "fast", None)
    slow = [tokenize(tokenizer, documents) for documents in (TEXTS + AWKWARD, pairs)]
    assert [[ids.tolist() for ids in found] for found in fast] == [[ids.tolist() for ids in found] for found in slow]


class Wrong:
    """Encodes like gigatoken, but for texts with a certain word in them."""

    def __init__(self, tokenizer, word):
        self.right, self.word = Encoder(tokenizer).fast, word

    def encode_batch(self, texts, parallel):
        return self.right.encode_batch([text.replace(self.word, "") for text in texts], parallel=parallel)


@pytest.mark.parametrize("place", ["a document in the middle", "the end of the only document"])
def test_a_faster_encoder_that_disagrees_is_not_used_and_that_is_said_once(tokenizer, monkeypatch, caplog, place):
    if place == "a document in the middle":
        texts = TEXTS[:400] + [text + " wrong" for text in TEXTS[400:450]] + TEXTS[450:]
    else:
        texts = ["".join(TEXTS) + "wrong " * 300]
    wrong = Wrong(tokenizer, "wrong")
    expected = [ids.tolist() for ids in tokenize(tokenizer, texts)]
    monkeypatch.setattr(encoder_of(tokenizer), "fast", wrong)
    encoder._say.cache_clear()
    for _ in range(2):
        assert [ids.tolist() for ids in tokenize(tokenizer, texts)] == expected
    assert caplog.text.count("does not agree") == 1


def test_a_faster_encoder_that_fails_is_not_used(tokenizer, monkeypatch, caplog):
    expected = [ids.tolist() for ids in tokenize(tokenizer, TEXTS)]
    monkeypatch.setattr(encoder_of(tokenizer), "fast", object())
    encoder._say.cache_clear()
    assert [ids.tolist() for ids in tokenize(tokenizer, TEXTS)] == expected
    assert "gigatoken failed" in caplog.text


@given(st.lists(st.lists(st.integers(3, 99), max_size=4), max_size=8), st.sampled_from([None, 0]))
def test_every_document_with_text_is_enclosed(documents, bos):
    encoded = ragged([np.array(ids, np.int64) for ids in documents])
    expected = [([] if bos is None else [bos]) + ids + [1] if ids else [] for ids in documents]
    assert [ids.tolist() for ids in _enclose(encoded, bos, 1)] == expected


def test_preparing_opens_a_tokenizer_without_torch(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    script = (
        "import sys\n"
        "from data_pipelines.tokenizing.encoding import tokenize\n"
        "from doge.tokenizer.loading import load_tokenizer\n"
        "(ids,) = tokenize(load_tokenizer(sys.argv[1]), ['The sum of 7'])\n"
        "print(ids.tolist(), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == f"{tokenize(tokenizer, ['The sum of 7'])[0].tolist()} False"
