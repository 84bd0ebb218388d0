"""Changing a token changes no earlier logit, no other document beside it, and no other row: on every path."""

import pytest
import torch
from tiny_models import logits_in_pieces, logits_of, tiny_model, tokens

PATHS = pytest.mark.parametrize(
    ("moe", "window", "dtype"),
    [
        pytest.param(moe, window, dtype, id=f"{'moe' if moe else 'dense'}-window{window}-{str(dtype)[6:]}")
        for moe in (False, True)
        for window in (2048, 16)
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
LENGTHS = [20, 25, 5]  # of three packed documents; two are longer than the small window
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)


def assert_same(actual, expected, dtype=torch.float32):
    """Equal up to the rounding of `dtype` at other shapes of products; in bfloat16 few logits differ by that much."""
    torch.testing.assert_close(actual, expected, atol=2e-5 if dtype == torch.float32 else 0.125, rtol=0)
    assert (actual - expected).float().abs().mean() < 0.003


def changed(input_ids, row, position):
    """The same tokens but for one."""
    other = input_ids.clone()
    other[row, position] = 3 + (other[row, position] - 2) % 125
    return other


@PATHS
@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_a_token_changes_no_earlier_logit(moe, window, dtype, cached):
    model = tiny_model(moe, window, dtype)
    input_ids = tokens(2, 50)

    def forward(input_ids):
        return logits_in_pieces(model, input_ids, [30, 20]) if cached else logits_of(model, input_ids)

    logits = forward(input_ids)
    for position in (49, 33, 20):
        other = forward(changed(input_ids, 0, position))
        assert torch.equal(other[0, :position], logits[0, :position])
        assert not torch.equal(other[0, position:], logits[0, position:])
        assert torch.equal(other[1], logits[1])  # nor another row


@PATHS
def test_a_row_is_what_it_is_alone(moe, window, dtype):
    model = tiny_model(moe, window, dtype)
    input_ids = tokens(3, 50)
    together = logits_of(model, input_ids)
    for row in range(3):
        assert_same(together[row : row + 1], logits_of(model, input_ids[row : row + 1]), dtype)


@PATHS
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_what_they_are_alone(moe, window, dtype, batch):
    model = tiny_model(moe, window, dtype)
    input_ids = tokens(batch, sum(LENGTHS))
    alone = torch.cat([logits_of(model, document) for document in input_ids.split(LENGTHS, dim=1)], dim=1)
    assert_same(logits_of(model, input_ids, position_ids=POSITIONS), alone, dtype)
    assert_same(logits_of(model, input_ids, position_ids=POSITIONS.expand(batch, -1)), alone, dtype)
    mask = torch.ones_like(input_ids)  # a mask that masks nothing does not join the documents
    assert_same(logits_of(model, input_ids, position_ids=POSITIONS, attention_mask=mask), alone, dtype)


@PATHS
def test_a_token_changes_no_other_packed_document(moe, window, dtype):
    model = tiny_model(moe, window, dtype)
    input_ids = tokens(1, sum(LENGTHS))
    logits = logits_of(model, input_ids, position_ids=POSITIONS)
    other = logits_of(model, changed(input_ids, 0, 10), position_ids=POSITIONS)
    assert torch.equal(other[:, 20:], logits[:, 20:])
    assert not torch.equal(other[:, 10:20], logits[:, 10:20])


def test_rows_may_be_packed_differently():
    model = tiny_model(window=16)
    input_ids = tokens(2, 50)
    positions = torch.stack([POSITIONS[0], torch.arange(50)])
    logits = logits_of(model, input_ids, position_ids=positions)
    assert_same(logits[:1], logits_of(model, input_ids[:1], position_ids=POSITIONS))
    assert_same(logits[1:], logits_of(model, input_ids[1:]))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("window", [2048, 16])
def test_a_packed_gradient_is_the_sum_of_the_documents_gradients(moe, window):
    model = tiny_model(moe, window).train()
    input_ids = tokens(1, sum(LENGTHS))
    labels = input_ids.masked_fill(POSITIONS == 0, -100)
    model(input_ids, labels=labels, position_ids=POSITIONS, reduction="sum").loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for document in input_ids.split(LENGTHS, dim=1):
        model(document, labels=document, reduction="sum").loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(moe, window, side):
    model = tiny_model(moe, window)
    input_ids, padding = tokens(2, 40), torch.full((2, 9), 2)
    real = torch.ones_like(input_ids)
    pieces = [(padding, torch.zeros_like(padding)), (input_ids, real)]
    if side == "right":
        pieces.reverse()
    padded, mask = (torch.cat(column, dim=1) for column in zip(*pieces, strict=True))
    kept = slice(9, None) if side == "left" else slice(None, 40)
    alone = logits_of(model, input_ids)
    assert_same(logits_of(model, padded, attention_mask=mask)[:, kept], alone)
    assert_same(logits_in_pieces(model, padded, [30, 1, 1, 17], attention_mask=mask)[:, kept], alone)
