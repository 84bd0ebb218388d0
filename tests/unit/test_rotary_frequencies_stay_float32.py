"""The frequencies of rotary embeddings are float32, however a model was made, and those of transformers."""

import copy

import pytest
import torch
import transformers
from tiny_models import logits_of, tiny_config, tiny_model, tokens
from transformers.models.doge.modeling_doge import DogeRotaryEmbedding

from doge.common.errors import UserError
from doge.conversion.load import load_model
from doge.model.attention.rotary import RotaryEmbedding
from doge.model.modeling import DogeForCausalLM, build_model

FAR = torch.arange(1000, 1040)[None]  # where a frequency's rounding to bfloat16 turns by radians

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "longrope": {
        "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)], "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    },
    "proportional": {"factor": 2.0},
}  # fmt: skip


def config_with(rope_type: str):
    config = tiny_config()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPES[rope_type]}
    return config


def converted(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    yield "to", copy.deepcopy(model).to(torch.bfloat16)
    yield "bfloat16", copy.deepcopy(model).bfloat16()
    yield "from_pretrained", DogeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    yield "load_model", load_model(tmp_path, torch.bfloat16).eval()
    with torch.device("meta"):
        empty = build_model(model.config)
    empty = empty.to_empty(device="cpu").to(torch.bfloat16)
    empty.load_state_dict(model.state_dict())
    yield "meta", empty.eval()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = build_model(model.config)
    finally:
        torch.set_default_dtype(default)
    built.load_state_dict(model.state_dict())
    yield "default dtype", built.eval()


def test_a_model_rotates_alike_however_it_became_bfloat16(tmp_path):
    angles = torch.arange(8) / 8
    exact = FAR[..., None].double() * 10_000.0 ** -angles.double()
    expected = torch.cat([exact, exact], dim=-1).cos()
    found = {}
    for way, model in converted(tmp_path):
        cosines, _ = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), FAR)
        assert cosines.dtype == torch.bfloat16
        torch.testing.assert_close(cosines.double(), expected, atol=2**-8, rtol=0, msg=way)
        found[way] = logits_of(model, tokens(1, 40), position_ids=FAR)
    for way, logits in found.items():
        assert torch.equal(logits, found["to"]), way


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double_change_no_frequency(dtype):
    model = tiny_model().to(dtype)
    frequencies, _ = model.model.rotary_emb.frequencies()
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, DogeRotaryEmbedding(model.config).inv_freq)


@pytest.mark.parametrize("length", [100, 4000], ids=["short", "longer than trained"])
@pytest.mark.parametrize("rope_type", ROPES)
def test_every_rope_type_is_that_of_transformers(rope_type, length):
    config, positions = config_with(rope_type), torch.arange(length)[None]
    states = torch.zeros(1)
    for mine, other in zip(
        RotaryEmbedding(config)(states, positions), DogeRotaryEmbedding(config)(states, positions), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_long_sequence_changes_nothing_for_the_next(rope_type):
    rotary, states = RotaryEmbedding(config_with(rope_type)), torch.zeros(1)
    positions = torch.arange(2100)[None]
    before = rotary(states, positions)
    rotary(states, torch.arange(9000)[None])
    for now, earlier in zip(rotary(states, positions), before, strict=True):
        assert torch.equal(now, earlier)


def test_the_state_dict_is_that_of_transformers():
    model = tiny_model()
    assert model.state_dict().keys() == transformers.DogeForCausalLM(model.config).state_dict().keys()
    assert not list(model.buffers())


def test_an_unknown_rope_type_is_one_sentence():
    config = tiny_config()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10_000.0}
    with pytest.raises(UserError, match="'spiral'"):
        build_model(config)
