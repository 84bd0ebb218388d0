"""Token-by-token generation gives the full forward's logits, and so does every way of cutting a prompt."""

import pytest
import torch
from tiny_models import logits_in_pieces, logits_of, tiny_config, tiny_model, tokens
from transformers import DynamicCache

from doge.common.errors import UserError
from doge.model.attention import DogeCache, KeyWindow

PIECES = pytest.mark.parametrize(
    "sizes",
    [[1] * 50, [20, 30], [10, 1, 1, 20, 18], [49, 1], [16, 17, 17]],
    ids=["token by token", "two chunks", "mixed", "prompt then token", "chunks at the window"],
)


@PIECES
@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("moe", [False, True])
def test_pieces_give_the_full_forward(moe, window, sizes):
    model = tiny_model(moe, window)
    input_ids = tokens(2, 50)
    torch.testing.assert_close(
        logits_in_pieces(model, input_ids, sizes), logits_of(model, input_ids), atol=2e-5, rtol=0
    )


@PIECES
@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("moe", [False, True])
def test_pieces_in_bfloat16_differ_by_its_rounding_alone(moe, window, sizes):
    """Rounding may tip a near-tie between experts or keys, so the bar is what rounding does to the full forward."""
    model, input_ids = tiny_model(moe, window, dtype=torch.bfloat16), tokens(2, 50)
    full, pieces = logits_of(model, input_ids), logits_in_pieces(model, input_ids, sizes)
    rounding = (full - logits_of(model.float(), input_ids)).abs()
    assert (pieces - full).abs().mean() <= rounding.mean()
    assert rounding.mean() < 0.05 * full.std()


def test_ties_for_the_window_are_settled_alike():
    """A new model gives every key the same bias: the window must slide the same way in prefill and decode."""
    model = tiny_model(window=16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.zero_()
    input_ids = tokens(1, 50)
    full = logits_of(model, input_ids)
    torch.testing.assert_close(logits_in_pieces(model, input_ids, [1] * 50), full, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits_in_pieces(model, input_ids, [30, 20]), full, atol=2e-5, rtol=0)


@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padded_generation_equals_unpadded(moe, window, search):
    model = tiny_model(moe, window)
    short, long = tokens(1, 9, seed=1), tokens(1, 20, seed=2)
    batch = torch.cat([torch.cat([torch.full((1, 11), 2), short], dim=1), long])
    mask = (batch != 2).long()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **search}
    together = model.generate(batch, attention_mask=mask, **settings)[:, 20:]
    assert torch.equal(together[:1], model.generate(short, **settings)[:, 9:])
    assert torch.equal(together[1:], model.generate(long, **settings)[:, 20:])


def test_greedy_generation_is_the_argmax_of_full_forwards():
    model = tiny_model(window=16)
    generated = model.generate(tokens(2, 12), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    logits = logits_of(model, generated)
    logits[..., 1] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(generated[:, 12:], logits[:, 11:-1].argmax(-1))


def test_a_packed_sequence_gives_no_cache():
    model = tiny_model()
    positions = torch.cat([torch.arange(20), torch.arange(30)]).unsqueeze(0)
    assert model(tokens(1, 50), position_ids=positions, use_cache=True).past_key_values is None


def test_a_cache_of_another_kind_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="static"):
        model.generate(tokens(1, 10), max_new_tokens=3, cache_implementation="static")
    with pytest.raises(UserError, match="DynamicCache"):
        model.generate(tokens(1, 10), max_new_tokens=3, past_key_values=DynamicCache(config=model.config))


@PIECES
def test_forced_keys_are_the_same_in_every_way_of_cutting(sizes):
    model = tiny_model(window=16)
    for layer in model.model.layers:
        layer.self_attn.window = KeyWindow(16, num_sinks=2, num_local=5)
    model.config.num_sink_keys, model.config.num_local_keys = 2, 5
    input_ids = tokens(2, 50)
    full = logits_of(model, input_ids)
    torch.testing.assert_close(logits_in_pieces(model, input_ids, sizes), full, atol=2e-5, rtol=0)
    assert (full - logits_of(tiny_model(window=16), input_ids)).abs().max() > 1e-3


def test_the_sinks_of_a_padded_row_are_its_own_first_tokens():
    model = tiny_model(window=8)
    for layer in model.model.layers:
        layer.self_attn.window = KeyWindow(8, num_sinks=3)
    model.config.num_sink_keys = 3
    row = tokens(1, 30)
    padded = torch.cat([torch.full((1, 11), 2), row], dim=1)
    mask = (torch.arange(41) >= 11).long()[None]
    full = logits_of(model, row)
    torch.testing.assert_close(logits_of(model, padded, attention_mask=mask)[:, 11:], full, atol=2e-5, rtol=0)
    for sizes in ([12, *[1] * 29], [20, 10, 1, 10]):
        pieces = logits_in_pieces(model, padded, sizes, attention_mask=mask)[:, 11:]
        torch.testing.assert_close(pieces, full, atol=2e-5, rtol=0)


def test_the_cache_stops_growing_at_the_window():
    model, cache = tiny_model(window=80), DogeCache(tiny_config(window=80))
    input_ids = torch.arange(3, 123)[None]
    slots = []
    with torch.no_grad():
        for start in range(0, 120, 10):
            model(input_ids[:, start : start + 10], past_key_values=cache)
            slots.append(cache.layers[0].keys.shape[2])
    assert slots == [64] * 6 + [80] * 6
    assert cache.get_seq_length() == 120
