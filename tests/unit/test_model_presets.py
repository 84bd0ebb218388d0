"""The eight sizes are those published, and a recipe that cannot be built says why."""

from dataclasses import replace

import pytest
from tiny_models import tiny_config
from transformers import DogeConfig

from doge.common.errors import UserError
from doge.model.configuration import (
    DogeMoeConfig,
    ModelRecipe,
    expert_grid,
    flops_per_token,
    num_parameters,
    preset_config,
    preset_names,
)
from doge.model.modeling import build_model


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("Doge-20M", 13_118_728),
        ("Doge-60M", 54_571_552),
        ("Doge-160M", 152_676_168),
        ("Doge-320M", 335_750_272),
    ],
)
def test_dense_presets_have_exactly_the_published_parameters(preset, parameters):
    config = ModelRecipe(preset).build()
    assert type(config) is DogeConfig
    assert num_parameters(config) == parameters


@pytest.mark.parametrize(
    ("preset", "millions"), [("Doge-MoE-20M", 15), ("Doge-MoE-80M", 75), ("Doge-MoE-220M", 224), ("Doge-MoE-500M", 505)]
)
def test_moe_presets_have_the_published_millions(preset, millions):
    config = ModelRecipe(preset).build()
    assert type(config) is DogeMoeConfig
    assert num_parameters(config) // 1_000_000 == millions


@pytest.mark.parametrize("preset", ["Doge-20M", "Doge-MoE-20M"])
def test_the_arithmetic_is_what_is_built(preset):
    config = ModelRecipe(preset).build()
    assert build_model(config).num_parameters() == num_parameters(config)


@pytest.mark.parametrize("moe", [False, True])
def test_the_arithmetic_holds_for_odd_shapes(moe):
    config = tiny_config(moe, num_key_value_heads=1, num_hidden_layers=3)
    config.attention_bias = config.mlp_bias = True
    config.tie_word_embeddings = False
    assert build_model(config).num_parameters() == num_parameters(config)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_share_tokens_positions_and_head_size(preset):
    config = preset_config(preset)
    assert (config.vocab_size, config.max_position_embeddings, config.keep_window_size) == (32768, 2048, 2048)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.hidden_size // config.num_attention_heads == 128
    assert config.tie_word_embeddings
    assert config.router_aux_loss_coef == 0.0


def test_a_recipe_changes_only_what_it_names():
    config = ModelRecipe("Doge-MoE-20M", num_hidden_layers=3, num_experts=64).build()
    assert (config.num_hidden_layers, config.num_experts, config.hidden_size) == (3, 64, 256)


def test_fresh_matrices_may_depend_on_their_fan_in():
    """Their products have one size at all widths; embeddings, vectors and experts start as without it."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
    for width in (64, 256):
        recipe = ModelRecipe("Doge-MoE-20M", hidden_size=width, intermediate_size=4 * width, **sizes)
        model = build_model(replace(recipe, initializer_scale=0.5).build())
        layer = model.model.layers[0]
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            assert linear.weight.std().item() == pytest.approx(0.5 * linear.in_features**-0.5, rel=0.05)
        for table in (model.model.embed_tokens, layer.mlp.up_embed):
            assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not layer.self_attn.A.any()
        plain = build_model(recipe.build()).model.layers[0]
        assert plain.mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (ModelRecipe("doge-moe-20"), "Doge-MoE-20M"),
        (ModelRecipe("Doge-20M", hidden_size=255), "hidden_size 255"),
        (ModelRecipe("Doge-60M", num_key_value_heads=3), "num_key_value_heads 3"),
        (ModelRecipe("Doge-20M", hidden_size=254), "odd head_dim of 127"),
        (ModelRecipe("Doge-20M", num_experts=64), "MoE preset"),
        (ModelRecipe("Doge-20M", keep_window_size=5, num_sink_keys=2, num_local_keys=3), "keep_window_size 5"),
        (ModelRecipe("Doge-20M", num_hidden_layers=0), "num_hidden_layers"),
        (ModelRecipe("Doge-20M", initializer_scale=0.0), "initializer_scale must be positive and finite, not 0.0"),
        (ModelRecipe("Doge-MoE-20M", num_experts=509), "509"),
        (ModelRecipe("Doge-MoE-20M", num_experts=4, num_experts_per_tok=5), "num_experts_per_tok 5"),
        (ModelRecipe("Doge-MoE-20M", expert_retrieval_size=7), "expert_retrieval_size 7"),
    ],
)
def test_an_impossible_recipe_is_one_sentence(recipe, says):
    with pytest.raises(UserError, match=says) as error:
        recipe.build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_experts", "grid"), [(512, (16, 32)), (1024, (32, 32)), (1536, (32, 48)), (2048, (32, 64)), (12, (3, 4))]
)
def test_the_grid_is_the_rectangle_closest_to_a_square(num_experts, grid):
    assert expert_grid(num_experts) == grid


def test_flops_count_parameters_and_the_keys_attended():
    config = preset_config("Doge-20M")
    assert flops_per_token(config, 1) == 6 * 13_118_728 + 12 * 8 * 256
    # Beyond the window, attention grows no further.
    assert flops_per_token(config, 1 << 20) == pytest.approx(6 * 13_118_728 + 12 * 8 * 256 * 2048, rel=2e-3)
