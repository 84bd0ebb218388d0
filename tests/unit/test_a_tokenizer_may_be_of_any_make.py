"""What is assumed of a tokenizer is read from it: its ids, how many there are, and which ones bound a document."""

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_tokenizers import WORDS, byte_level, opened, sentencepiece_bpe, unigram, with_ids, word_level
from transformers import AutoModelForCausalLM, GenerationConfig

from data_pipelines.tokenizing.encoder import encoder_of
from data_pipelines.tokenizing.encoding import tokenize
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.conversion.export import export_model
from doge.conversion.load import load_model
from doge.generation.decoder import Decoder
from doge.generation.samples import generate_samples
from doge.model.modeling import build_model
from doge.tokenizer.loading import check_vocabulary, load_tokenizer, vocabulary_size
from doge.training.state.train_state import TrainState

END = "<|document_end|>"
LONG = " ".join(WORDS)
CUT = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
FILLED = {
    "strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5, "pad_type_id": 0,
    "pad_token": "&",
}  # fmt: skip


@pytest.mark.parametrize("fast", [True, False], ids=["gigatoken", "tokenizers"])
@pytest.mark.parametrize("setting", [{"truncation": CUT}, {"padding": FILLED}, {"dropout": 0.5}], ids=" ".join)
def test_no_setting_of_a_tokenizer_cuts_fills_or_varies_a_document(tmp_path, setting, fast, monkeypatch):
    plain = opened(byte_level([END]), tmp_path, eos_token=END)
    expected = [ids.tolist() for ids in tokenize(plain, ["Short.", LONG])]
    path = tmp_path / "tokenizer.json"
    config = json.loads(path.read_text())
    if "dropout" in setting:
        config["model"] |= setting
    else:
        config |= setting
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    if not fast:
        monkeypatch.setattr(encoder_of(tokenizer), "fast", None)
    assert [ids.tolist() for ids in tokenize(tokenizer, ["Short.", LONG])] == expected


def test_ids_may_leave_some_out(tmp_path):
    tokenizer = opened(with_ids(byte_level([]), {END: 70_000}), tmp_path, eos_token=END)
    assert len(tokenizer) < vocabulary_size(tokenizer) == 70_001
    (ids,) = tokenize(tokenizer, ["Every river"])
    assert ids.dtype == np.uint32
    assert ids[-1] == 70_000
    check_vocabulary(tokenizer, 70_001)
    with pytest.raises(UserError, match=r"go up to 70,000.*set --model\.vocab-size 70001 or"):
        check_vocabulary(tokenizer, 70_000)


@pytest.mark.parametrize("tokens", [{}, {"eos_token": "<unk>", "unk_token": "<unk>"}], ids=["none", "the unknown word"])
def test_a_tokenizer_without_an_eos_of_its_own_is_one_sentence(tmp_path, tokens):
    with pytest.raises(UserError, match="has no eos_token of its own: set one"):
        opened(word_level(), tmp_path, **tokens)


@pytest.mark.parametrize("make", [word_level, unigram, sentencepiece_bpe])
def test_no_text_spells_the_end_of_a_document_whatever_the_tokenizers_model(tmp_path, make):
    tokenizer = opened(make(), tmp_path, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    (ids,) = tokenize(tokenizer, ["Every river </s> runs <s> over"])
    assert (ids.tolist().count(tokenizer.bos_token_id), ids.tolist().count(tokenizer.eos_token_id)) == (1, 1)
    (ids,) = tokenize(tokenizer, ["Every river runs over"])
    assert ids[1:-1].tolist() == tokenizer.encode("Every river runs over", add_special_tokens=False)


@pytest.fixture(
    params=[{"bos_token": END}, {}, {"pad_token": "Ġriver"}], ids=["BOS is EOS", "EOS alone", "EOS and PAD"]
)
def tokenizer(request, tmp_path):
    return opened(byte_level([END]), tmp_path / "tokenizer", eos_token=END, **request.param)


def special_ids(of):
    return of.bos_token_id, of.eos_token_id, of.pad_token_id


def state_that_ends_everything(config, end: int) -> TrainState:
    """A state of a model that continues whatever it reads with one token."""
    model = build_model(config)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    embedding = parameters["model.embed_tokens.weight"].zero_()
    embedding[:, 0] = 1
    embedding[end, 0] = 50
    return TrainState(1, parameters, {})


def test_an_exported_model_carries_the_tokenizers_ids_and_stops_at_its_end(tokenizer, tmp_path):
    config, expected = tiny_config(vocab_size=512), special_ids(tokenizer)
    state = state_that_ends_everything(config, tokenizer.eos_token_id)
    model = export_model(state, config, tokenizer, Storage(str(tmp_path)), "model")
    assert special_ids(config) == (0, 1, 2)  # the recipe's is left alone
    found = json.loads((tmp_path / "model/config.json").read_text())
    assert tuple(found[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")) == expected
    assert special_ids(GenerationConfig.from_pretrained(tmp_path / "model")) == expected
    ours, stock = load_model(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for loaded in (ours, stock):
        assert special_ids(loaded.config) == expected
        output = loaded.generate(torch.tensor([[10, 11]]), max_new_tokens=5, do_sample=False)
        assert output[0, 2:].tolist() == [tokenizer.eos_token_id]
    assert Decoder(ours, compile=False).generate([[10, 11]], max_new_tokens=5) == [[]]
    assert generate_samples(model, tokenizer, ["Every", ""], max_new_tokens=3) == ["", ""]


def test_every_row_of_the_embedding_learns():
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[0, 1, 2, 3, 2, 5]])
    model(ids, labels=ids).loss.backward()
    assert (model.model.embed_tokens.weight.grad[:4].abs().sum(-1) > 0).all()
