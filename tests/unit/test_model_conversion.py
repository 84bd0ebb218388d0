"""Checkpoints of transformers' MoE layout, dense models that grow experts, and checkpoints that are something else."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, shake, tiny_config, tiny_model, tokens

from doge.common.errors import UserError
from doge.conversion.grow_experts import add_experts, expert_parameter_names
from doge.conversion.load import load_model
from doge.conversion.transformers_moe import convert_transformers_moe
from doge.model.modeling import DogeMoeForCausalLM, build_model

EXPERTS = {"num_experts": 32, "num_expert_heads": 2, "num_experts_per_tok": 3, "expert_retrieval_size": 16}


def stock_moe(num_experts=20, **changes):
    """transformers' MoE layout; of 20 experts its 4 x 4 grid reaches 16."""
    config = tiny_config(window=16)
    for name, value in {"is_moe": True, "num_experts": num_experts, "num_experts_per_tok": 3, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)  # else the weights depend on the tests before, and with them the rounding
    return shake(transformers.DogeForCausalLM(config)).eval()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_transformers_layout_keeps_its_function_token_by_token(tmp_path, norm_topk_prob):
    """Token by token is where the published routing does not mix tokens."""
    stock = stock_moe(norm_topk_prob=norm_topk_prob)
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is DogeMoeForCausalLM
    assert model.config.num_experts == 16
    input_ids = tokens(1, 30)
    cache, expected = None, []
    for position in range(30):
        with torch.no_grad():
            output = stock(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected.append(output.logits)
    torch.testing.assert_close(logits_of(model, input_ids), torch.cat(expected, dim=1), atol=5e-5, rtol=0)


def test_a_converted_model_can_be_saved_and_opened(tmp_path):
    model = convert_transformers_moe(stock_moe())
    model.save_pretrained(tmp_path)
    input_ids = tokens(2, 30)
    assert torch.equal(logits_of(load_model(tmp_path), input_ids), logits_of(model, input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_experts_changes_no_logit(dtype):
    dense = tiny_model(window=16, dtype=dtype)
    grown = add_experts(dense, **EXPERTS)
    assert type(grown) is DogeMoeForCausalLM
    assert grown.dtype == dtype
    input_ids = tokens(2, 50)
    assert torch.equal(logits_of(grown, input_ids), logits_of(dense, input_ids))


def test_the_warm_up_parameters_are_those_that_were_added():
    dense = tiny_model()
    grown = add_experts(dense, **EXPERTS)
    added = {name for name, _ in grown.named_parameters()} - {name for name, _ in dense.named_parameters()}
    assert set(expert_parameter_names(grown)) == added
    assert expert_parameter_names(dense) == []


def test_added_experts_learn_with_the_rest_frozen():
    grown = add_experts(tiny_model(), **EXPERTS).train()
    warm_up = set(expert_parameter_names(grown))
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(name in warm_up)
    optimizer = torch.optim.Adam([p for p in grown.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    losses = []
    for _ in range(5):
        loss = grown(tokens(2, 50), labels=tokens(2, 50)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in grown.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in warm_up), name


def test_growing_twice_and_converting_a_dense_model_are_refused():
    with pytest.raises(UserError, match="already"):
        add_experts(tiny_model(moe=True), **EXPERTS)
    with pytest.raises(UserError, match="add_experts"):
        convert_transformers_moe(transformers.DogeForCausalLM(tiny_config()))


def test_the_transformers_layout_is_not_opened_as_it_is():
    with pytest.raises(UserError, match="load_model"):
        build_model(stock_moe().config)


def test_another_model_is_refused_in_one_sentence(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'llama' model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("moe", [False, True])
def test_weights_of_another_shape_are_refused_in_one_sentence(tmp_path, moe):
    tiny_model(moe).save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=80)
    with pytest.raises(UserError, match="do not fit") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_unknown_weights_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    removed = weights.pop("model.layers.1.self_attn.A")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'model.layers.1.self_attn.A'"):
        load_model(tmp_path)
    save_file(
        weights | {"model.layers.1.self_attn.A": removed, "stray": removed.clone()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="stray"):
        load_model(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model"):
        load_model(tmp_path)
