"""Embeddings, vectors and hidden matrices may learn at rates of their own; by default all have one."""

import pytest
import torch

from doge.common.errors import UserError
from doge.model.configuration import ModelRecipe
from doge.model.modeling import build_model
from doge.training.optimizer import OptimizerRecipe


def model(width=64):
    recipe = ModelRecipe(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    return build_model(recipe.build())


def settings(recipe, network):
    """(peak learning rate, weight decay) of every parameter by name; each is in one group."""
    groups = recipe.build(network).param_groups
    found = {id(p): (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert all(group["lr"] == group["initial_lr"] for group in groups)
    return {name: found[id(parameter)] for name, parameter in network.named_parameters()}


def test_by_default_all_have_one_rate_and_matrices_decay():
    network = model()
    of = settings(OptimizerRecipe(lr=5e-3, weight_decay=0.1), network)
    assert of == {name: (5e-3, 0.1 if p.ndim >= 2 else 0.0) for name, p in network.named_parameters()}
    assert len(OptimizerRecipe().build(network).param_groups) == 2


@pytest.mark.parametrize("hidden", ["adamw", "muon"])
def test_each_kind_has_its_own(hidden):
    recipe = OptimizerRecipe(
        lr=1e-3, embedding_lr=2e-2, vector_lr=3e-3, weight_decay=0.1, embedding_weight_decay=0.0, muon_lr=4e-2,
        hidden_matrices=hidden,
    )  # fmt: skip
    of = settings(recipe, model())
    assert of.pop("model.embed_tokens.weight") == (2e-2, 0.0)
    for name, setting in of.items():
        if "norm" in name or name.endswith(("residual", "A")):
            assert setting == (3e-3, 0.0), name
        elif hidden == "muon" and "dt_proj" not in name:
            assert setting == (4e-2, 0.1), name
        else:
            assert setting == (1e-3, 0.1), name


def test_an_output_of_its_own_is_an_embedding():
    recipe = ModelRecipe(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=128).build()
    recipe.tie_word_embeddings = False
    of = settings(OptimizerRecipe(lr=1e-3, embedding_lr=2e-2, hidden_matrices="muon"), build_model(recipe))
    assert of["lm_head.weight"] == of["model.embed_tokens.weight"] == (2e-2, 0.01)


def test_the_rate_of_hidden_matrices_goes_with_the_width():
    recipe = OptimizerRecipe(lr=8e-3, base_width=64)
    narrow, wide = (settings(recipe, model(width)) for width in (64, 256))
    for name, (lr, weight_decay) in narrow.items():
        hidden = name.endswith("proj.weight")
        assert lr == 8e-3
        assert wide[name] == (2e-3 if hidden else 8e-3, weight_decay), name


@pytest.mark.parametrize("width", [32, 128])
def test_one_rate_of_muon_moves_every_width_alike(width):
    """The gain of an update, its largest singular value, is the same at all widths, up to the iteration's tolerance."""
    network = model(width)
    weights = network.model.layers[0].mlp.up_proj.weight
    before = weights.detach().clone()
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    OptimizerRecipe(hidden_matrices="muon", muon_lr=0.1, weight_decay=0.0).build(network).step()
    gain = torch.linalg.matrix_norm(weights.detach() - before, ord=2) / (weights.shape[0] / weights.shape[1]) ** 0.5
    assert 0.07 < gain < 0.13


def test_a_width_of_no_embedding_is_one_sentence():
    with pytest.raises(UserError, match=r"optimizer.base_width needs a model with an embedding"):
        OptimizerRecipe(base_width=64).build(torch.nn.Linear(4, 4))


def test_a_plan_says_every_rate():
    recipe = OptimizerRecipe(lr=4e-3, embedding_lr=2e-2, vector_lr=1e-2, base_width=128)
    assert recipe.describe() == "AdamW, peak learning rate 0.004, at width 128, embedding 0.02, vectors 0.01"
