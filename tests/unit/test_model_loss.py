"""The chunked loss is the cross-entropy, to the last gradient, without the logits ever being whole."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from tiny_models import VOCAB_SIZE, tiny_model, tokens

from doge.model import loss as loss_module
from doge.model.configuration import ModelRecipe
from doge.model.loss import IGNORE_INDEX, LMHead, linear_cross_entropy
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch


def random_case(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(50, 16, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(30, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 30, (50,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run where Triton's kernels are")
def test_the_loss_of_a_gpu_is_the_same(monkeypatch):
    """Under Triton's interpreter: `test_the_triton_kernel_equals_the_reference.py` runs it."""
    monkeypatch.setattr(loss_module, "_suits_liger", lambda hidden_states: True)
    monkeypatch.setattr(loss_module, "_by_chunks", None)  # not called
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        hidden, weight, targets = random_case(dtype)
        logits = (hidden @ weight.T).float()
        exact = F.cross_entropy(logits, targets, reduction="sum")
        exact = exact + 0.01 * logits.logsumexp(-1)[targets != IGNORE_INDEX].square().sum()
        ours = linear_cross_entropy(hidden, weight, targets, z_loss=0.01)
        assert ours.dtype == torch.float32
        for _ in range(2):  # a second time changes nothing
            found = torch.autograd.grad(ours * 0.3, (hidden, weight), retain_graph=True)
            expected = torch.autograd.grad(exact * 0.3, (hidden, weight), retain_graph=True)
            for mine, other in zip((ours, *found), (exact, *expected), strict=True):
                torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, targets, z_loss=0.01), ours)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["ordinary", "far beyond the range of exp"])
def test_loss_and_gradients_equal_cross_entropy(chunk, scale):
    hidden, weight, targets = random_case(scale=scale)
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, targets, chunk),
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum"),
    ):
        results.append((loss, *torch.autograd.grad(loss * 0.3, (hidden, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("z_loss", [1e-3, 0.5])
def test_the_z_loss_and_its_gradients_are_exact(chunk, z_loss):
    hidden, weight, targets = random_case()
    logits, counted = hidden @ weight.T, targets != IGNORE_INDEX
    plain = F.cross_entropy(logits, targets, reduction="sum")
    theirs = plain + z_loss * logits.logsumexp(dim=-1)[counted].square().sum()
    ours = linear_cross_entropy(hidden, weight, targets, chunk, z_loss)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    expected = torch.autograd.grad(theirs * 0.3, (hidden, weight))
    for mine, other in zip(torch.autograd.grad(ours * 0.3, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_without_a_z_loss_nothing_changes_in_any_digit():
    hidden, weight, targets = random_case(torch.bfloat16)
    results = []
    for z_loss in ({}, {"z_loss": 0.0}):
        loss = linear_cross_entropy(hidden, weight, targets, **z_loss)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_z_loss_is_of_training_alone_and_adds_up_over_micro_batches():
    objective = NextTokenPrediction(
        ModelRecipe(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1),
        z_loss=0.1,
    )
    model, input_ids = objective.build(), tokens(4, 20) % 64
    batch = TensorBatch({"input_ids": input_ids, "labels": input_ids, "position_ids": torch.arange(20).expand(4, -1)})
    evaluated = objective.loss_sum(model.eval(), batch).loss
    assert torch.equal(evaluated, replace(objective, z_loss=0.0).loss_sum(model, batch).loss)
    whole = objective.loss_sum(model.train(), batch).loss
    torch.testing.assert_close(
        whole, objective.loss_sum(model, batch[:1]).loss + objective.loss_sum(model, batch[1:]).loss
    )
    logits = model(input_ids).logits[:, :-1]
    torch.testing.assert_close(whole, evaluated + 0.1 * logits.logsumexp(-1).square().sum())
    assert objective.loss_sum(model, objective.empty()).loss == 0


def test_bfloat16_differs_by_rounding_only():
    hidden, weight, targets = random_case(torch.bfloat16)
    ours = linear_cross_entropy(hidden, weight, targets, 8)
    theirs = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_without_gradients_none_are_computed():
    hidden, weight, targets = random_case()
    expected = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Allocations() as allocations:
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected.detach())
    assert (tuple(weight.shape), torch.float32) not in allocations.results


def test_a_frozen_weight_or_input_gets_no_gradient():
    hidden, weight, targets = random_case()
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    weight.grad = None
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_counted_token_is_zero_loss_and_zero_gradient():
    model = tiny_model().train()
    input_ids = tokens(1, 20)
    output = model(input_ids, labels=torch.full_like(input_ids, -100))
    output.loss.backward()
    assert output.loss == 0
    assert output.num_loss_tokens == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_model_gives_sum_mean_and_share_of_a_batch():
    model = tiny_model()
    input_ids = tokens(2, 30)
    labels = input_ids.masked_fill(torch.arange(30) < 10, -100)
    logits = model(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    total = model(input_ids, labels=labels, reduction="sum")
    assert total.num_loss_tokens == 40
    assert total.logits is None
    torch.testing.assert_close(total.loss, expected)
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected / 40)
    for num_items in (64, torch.tensor(64)):
        torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=num_items).loss, expected / 64)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, expected / 40)


def test_logits_come_with_the_loss_on_request():
    model = tiny_model()
    input_ids = tokens(1, 20)
    logits = model(input_ids).logits
    assert torch.equal(model(input_ids, labels=input_ids, return_logits=True).logits, logits)
    model.return_logits = True
    assert torch.equal(model(input_ids, labels=input_ids).logits, logits)
    assert model(input_ids, labels=input_ids, return_logits=False).logits is None


def test_an_unknown_reduction_is_refused():
    from doge.common.errors import UserError

    input_ids = tokens(1, 20)
    with pytest.raises(UserError, match="average"):
        tiny_model()(input_ids, labels=input_ids, reduction="average")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_never_holds_the_logits_of_the_batch(monkeypatch, dtype):
    import doge.model.loss

    monkeypatch.setattr(doge.model.loss, "TOKEN_CHUNK", 16)
    model = tiny_model(dtype=dtype).train()
    input_ids = tokens(4, 50)
    with Allocations() as allocations:
        model(input_ids, labels=input_ids).loss.backward()
    rows = [shape[0] for shape, _ in allocations.results if len(shape) == 2 and shape[1] == VOCAB_SIZE]
    assert max(rows) == 64 or max(rows) == 16  # hidden_size x vocab_size, a transposed weight, is no logits
    with Allocations() as allocations:
        model(input_ids, labels=input_ids, return_logits=True)
    assert ((4, 50, VOCAB_SIZE), dtype) in allocations.results  # the watch would have seen them


def test_loss_and_logits_come_from_the_module_that_owns_the_weight():
    """Hooks that gather a sharded weight fire on that module's forward."""
    model = tiny_model()
    calls = []
    assert isinstance(model.lm_head, LMHead)
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    input_ids = tokens(1, 20)
    model(input_ids, labels=input_ids)
    assert calls == [1]


@pytest.mark.parametrize(
    "factor", [1 / 3, 1e5, 1 / 100_003], ids=["a third", "a loss scale", "a mean over many tokens"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_gradients_are_scaled_before_they_are_rounded(dtype, factor):
    """A factor rounded to the gradients' dtype would be off by up to 1 / 256, or infinite."""
    hidden, weight, targets = random_case(dtype, scale=2.0**-12 if factor > 1 else 64.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss, (hidden, weight), torch.tensor(factor))
    _, *unrounded = loss_module._by_chunks(hidden.detach(), weight.detach(), targets, True, True, 256)
    for own, found, exact in zip(plain, scaled, unrounded, strict=True):
        assert found.dtype == own.dtype == dtype
        assert torch.equal(found, (exact.double() * torch.tensor(factor).double()).float().to(dtype))
