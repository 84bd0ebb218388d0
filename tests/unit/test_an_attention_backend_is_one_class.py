"""An attention backend is one registered class: it is chosen where it can compute, and nothing else knows it."""

import logging

import pytest
import torch
from tiny_models import logits_of, tiny_model, tokens

from doge.model.attention import dynamic_mask_attention
from doge.model.attention.backends import registry


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A backend that exists in this test alone, for float32 on a CPU, and the head dims of the calls it computed."""
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    registry._warn_once.cache_clear()
    torch._dynamo.reset()
    found: list[int] = []

    @registry.register
    class Doubling:
        name = "doubling"
        device_types = ("cpu",)
        priority = 7

        def unsupported_reason(self, device, dtype, head_dim, dropout):
            return None if dtype == torch.float32 else f"it does not support {dtype}"

        def attend(self, query, key, value, bias, window, document_ends, order, dropout_p):
            if not torch.compiler.is_compiling():
                found.append(query.shape[-1])
            return query.transpose(1, 2) * 2

    return found


def states(dtype=torch.float32, batch=1):
    generator = torch.Generator().manual_seed(batch)
    *three, bias = (torch.randn(batch, 2, 9, width, generator=generator) for width in (8, 8, 8, 1))
    return *(x.to(dtype) for x in three), bias[..., 0]


def test_it_computes_what_it_supports(calls):
    query, key, value, bias = states()
    output = dynamic_mask_attention(query, key, value, bias, window=4)
    assert torch.equal(output, query.transpose(1, 2) * 2)
    assert calls == [8]


def test_a_whole_model_runs_on_it(calls):
    model, row = tiny_model(), tokens(1, 9)
    logits = logits_of(model, row)
    assert len(calls) == model.config.num_hidden_layers
    registry.BACKENDS.pop("doubling")
    assert not torch.allclose(logits_of(model, row), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_breaks_no_graph_and_says_once_what_was_passed_over(dtype, caplog):
    @torch.compile(fullgraph=True, backend="eager")
    def attend(query, key, value, bias):
        return dynamic_mask_attention(query, key, value, bias, window=4)

    with caplog.at_level(logging.WARNING, "doge"):
        for batch in (1, 2, 3):
            inputs = states(dtype, batch)
            assert torch.equal(attend(*inputs), dynamic_mask_attention(*inputs, window=4))
    declined = "doubling cannot run here: it does not support torch.bfloat16. cpu_flash computes the same"
    assert [declined in record.message for record in caplog.records] == ([True] if dtype == torch.bfloat16 else [])


@pytest.mark.parametrize(
    ("device", "dropout", "name"),
    [("cpu", False, "cpu_flash"), ("cpu", True, "torch_sdpa"), ("mps", False, "torch_sdpa")],
)
def test_every_module_of_the_package_is_found_and_every_device_has_one(device, dropout, name):
    assert set(registry.BACKENDS) == {"doubling", "cpu_flash", "torch_sdpa", "triton"}
    assert registry.choose_backend(torch.device(device), torch.bfloat16, 64, dropout).name == name
