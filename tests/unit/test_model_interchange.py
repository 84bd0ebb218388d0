"""A dense checkpoint of ours is one of transformers', and the other way round."""

import pytest
import torch
import transformers
from tiny_models import logits_of, shake, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM

from doge.conversion.load import load_model
from doge.model.modeling import DogeForCausalLM, DogeMoeForCausalLM

WINDOWS = pytest.mark.parametrize("window", [2048, 16], ids=["below the window", "above the window"])


def stock_twin(model):
    """transformers' model with the same weights."""
    twin = transformers.DogeForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@WINDOWS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_our_checkpoint_opens_in_stock_transformers(tmp_path, window, attention):
    model = tiny_model(window=window)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert type(stock) is transformers.DogeForCausalLM
    input_ids = tokens(2, 50)
    torch.testing.assert_close(logits_of(model, input_ids), logits_of(stock, input_ids), atol=1e-5, rtol=0)


@WINDOWS
def test_a_stock_checkpoint_opens_here(tmp_path, window):
    stock = shake(transformers.DogeForCausalLM(tiny_config(window=window))).eval()
    stock.save_pretrained(tmp_path)
    input_ids = tokens(2, 50)
    for model in (DogeForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        torch.testing.assert_close(logits_of(model, input_ids), logits_of(stock, input_ids), atol=1e-5, rtol=0)


@WINDOWS
def test_loss_and_every_gradient_equal_transformers(window):
    model = tiny_model(window=window)
    stock = stock_twin(model)
    input_ids = tokens(2, 50)
    labels = input_ids.clone()
    labels[0, :20] = -100
    losses = [m(input_ids, labels=labels).loss for m in (model, stock)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@WINDOWS
def test_generation_equals_transformers(window, search):
    model = tiny_model(window=window)
    input_ids = tokens(2, 12)
    settings = {"max_new_tokens": 3 if window == 16 else 20, "do_sample": False, **search}
    assert torch.equal(model.generate(input_ids, **settings), stock_twin(model).generate(input_ids, **settings))


def test_sampling_equals_transformers():
    model = tiny_model()
    input_ids = tokens(2, 12)
    sampled = []
    for m in (model, stock_twin(model)):
        torch.manual_seed(3)
        sampled.append(m.generate(input_ids, max_new_tokens=20, do_sample=True, top_k=20))
    assert torch.equal(*sampled)


def test_an_moe_checkpoint_round_trips_and_says_what_it_is(tmp_path):
    model = tiny_model(moe=True)
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "doge_moe"
    input_ids = tokens(2, 50)
    for opened in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(opened) is DogeMoeForCausalLM
        assert torch.equal(logits_of(model, input_ids), logits_of(opened, input_ids))


def test_a_new_model_starts_as_transformers_does():
    model = DogeForCausalLM(tiny_config())
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("_residual"):
            assert (parameter == 1).all(), name
        elif name.endswith(".A"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("moe", [False, True])
def test_gradient_checkpointing_changes_no_gradient(moe):
    input_ids = tokens(2, 40)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(moe, window=16).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=0, rtol=0, msg=name)
        assert gradient.abs().max() > 0, name
