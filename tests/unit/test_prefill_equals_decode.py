"""Token-by-token generation gives the full forward's logits, and so does every way of cutting a prompt."""

import pytest
import torch
from tiny_models import logits_in_pieces, logits_of, tiny_model, tokens

from doge.errors import UserError

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


def test_a_cache_of_fixed_size_is_refused():
    with pytest.raises(UserError, match="static"):
        tiny_model().generate(tokens(1, 10), max_new_tokens=3, cache_implementation="static")
