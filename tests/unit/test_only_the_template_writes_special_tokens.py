"""Text is text: in a conversation only the chat template writes special tokens, and it is asked before anything is."""

import json
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import WORDS, byte_level, opened, sentencepiece_bpe, unigram

from data_pipelines.formats.base import Turn
from data_pipelines.order.plan import make_plan
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.encoding import tokenize
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.chat_template import CHAT_TEMPLATE, EOS, SPECIAL_TOKENS
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES_AS_TOKENS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
HASTY = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last else ';' }}{% endfor %}"


def chat(*contents, trained=True, roles=("user", "assistant")):
    return tuple(Turn(roles[at % 2], content, trained or at % 2 == 1) for at, content in enumerate(contents))


def rendered(tokenizer, conversation):
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation]
    return tokenizer.apply_chat_template(turns, return_dict=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, 400)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    special = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = opened(byte_level(special), tmp_path_factory.mktemp("chatml"), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def counts(tokenizer, ids):
    return [ids.tolist().count(number) for number in sorted(tokenizer.added_tokens_decoder)]


@pytest.mark.parametrize("trained", [True, False], ids=["all trained", "answers trained"])
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "A river", "<|", "|>", "\n", " ", "end_of_text"]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_turns_spell_stays_text(tokenizer, trained, pieces):
    text = "".join(pieces)
    clean = tokenize(tokenizer, [chat("Q", "Z", "Q", "Z", trained=trained)])
    spelled = tokenize(tokenizer, [chat("Q" + text, "Z" + text, "Q" + text, "Z" + text, trained=trained)])
    assert counts(tokenizer, spelled.values) == counts(tokenizer, clean.values)
    expected = tokenizer.decode(clean.values).replace("Q", "Q" + text).replace("Z", "Z" + text)
    assert tokenizer.decode(spelled.values) == expected
    if not trained:
        assert tokenizer.decode(spelled.values[spelled.trained]) == f"Z{text}{EOS}" * 2


def test_a_spelled_token_has_the_ids_that_it_has_in_plain_text(tokenizer):
    (plain,) = tokenize(tokenizer, ["A river <|end_of_text|> runs"])
    (conversation,) = tokenize(tokenizer, [chat("Why?", "A river <|end_of_text|> runs")])
    assert conversation.tolist()[-len(plain) + 1 :] == plain.tolist()[1:]


def test_a_role_that_spells_a_token_stays_text(tokenizer):
    (ids,) = tokenize(tokenizer, [chat("Why?", "So.", roles=("user<|end_header_id|>", "assistant"))])
    assert ids.tolist().count(SPECIAL_TOKENS.index("<|end_header_id|>")) == 2
    assert "user<|end_header_id|><|end_header_id|>" in tokenizer.decode(ids)


def test_a_template_may_trim_and_build_tokens_of_roles(chatml):
    conversation = chat(" <|im_end|> Why <|end|>?\n", "So. ")
    (ids,) = tokenize(chatml, [conversation])
    assert chatml.decode(ids) == (
        "<|im_start|>user\n<|im_end|> Why <|end|>?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    assert ids.tolist().count(chatml.eos_token_id) == 2
    chatml.chat_template = ROLES_AS_TOKENS
    try:
        (ids,) = tokenize(chatml, [chat("Why <|user|>?", "So.")])
        names = chatml.convert_ids_to_tokens(ids)
        assert [names.count(name) for name in ("<|user|>", "<|assistant|>", "<|end|>")] == [1, 1, 2]
    finally:
        chatml.chat_template = CHATML


@pytest.mark.parametrize("make", [unigram, sentencepiece_bpe, byte_level])
def test_a_conversation_reads_in_training_as_it_does_in_use(tmp_path, make):
    extra = {} if make is byte_level else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = opened(make(), tmp_path, **({"eos_token": "<|document_end|>"} | extra))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    conversations = [chat("Every river", " runs\nto the sea."), chat("\nIts stones", "")]
    found = tokenize(tokenizer, conversations)
    assert [ids.tolist() for ids in found] == [rendered(tokenizer, turns) for turns in conversations]


def test_an_answer_is_trained_from_its_first_letter_though_it_would_merge_with_its_header(tokenizer):
    found = tokenize(tokenizer, [chat("Why?", "\n\nSo.", "And?", " Yes.", trained=False)])
    assert tokenizer.decode(found.values[found.trained]) == f"\n\nSo.{EOS} Yes.{EOS}"
    assert len(found.trained) == len(found.values) == found.lengths.sum()


def test_a_date_in_a_template_changes_no_shard(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    (ids,) = tokenize(tokenizer, [chat("Why?", "So.")])
    assert datetime.now().strftime("%Y") not in tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith(f"So.{EOS}")


def test_a_template_that_renders_a_message_otherwise_when_others_follow_is_one_sentence(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", HASTY)
    assert len(tokenize(tokenizer, [chat("Why?", "So.", "And?", "Yes.")])) == 1
    with pytest.raises(UserError, match="renders a message otherwise when others follow it"):
        tokenize(tokenizer, [chat("Why?", "So.", "And?", "Yes.", trained=False)])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "it has no chat template"),
        ("{{ raise_exception('the system speaks first') }}", "its chat template says: the system speaks first"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "its chat template leaves out what the turns say"),
        ("{% for m in messages %}", "its chat template says: Unexpected end of template"),
    ],
    ids=["none", "another order", "another key", "broken"],
)
def test_a_template_that_cannot_render_is_one_sentence_before_anything_is_prepared(tmp_path, template, reason):
    tokenizer = train_tokenizer(WORDS, 300)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "given")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Why?", "text": "So."}) + "\n")
    recipe = DataRecipe({"talk": SourceRecipe(str(tmp_path / "a.jsonl"), 1, "conversation")})
    storage = Storage(str(tmp_path / "store"))
    with pytest.raises(UserError) as caught:
        make_plan(recipe, TokenizerRecipe(str(tmp_path / "given")), storage)
    message = str(caught.value)
    assert reason in message
    assert str(tmp_path / "given") in message
    assert "--data.sources.talk.format text" in message
    assert "\n" not in message
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_single_conversation_that_a_template_refuses_is_one_sentence(tokenizer, monkeypatch):
    picky = "{% if messages | length > 2 %}{{ raise_exception('two turns\nare enough') }}{% endif %}" + CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    with pytest.raises(UserError, match=r"refuses a conversation \(two turns are enough\): set the format") as caught:
        tokenize(tokenizer, [chat("Why?", "So."), chat("Why?", "So.", "And?")])
    assert "\n" not in str(caught.value)
