"""The bias of a key is an exponential that can overflow nothing, forward or backward, on any backend."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tokens

from doge.generation import Decoder
from doge.model.attention.backends.registry import BACKENDS
from doge.model.attention.key_bias import LARGEST_EXPONENT, key_bias
from doge.model.attention.window import KeyWindow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_an_ordinary_bias_is_the_exponential_to_the_last_bit():
    A, steps = torch.randn(4), torch.randn(100, 4) * 3
    assert torch.equal(key_bias(A, steps), torch.exp(A * F.softplus(steps)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_gradients_equal_float64(dtype):
    """Above the largest exponent, those of the tangent there."""
    A = torch.tensor([-3.0, 0.0, 0.5, 4.0, 60.0], dtype=dtype, requires_grad=True)
    steps = torch.linspace(-30, 30, 61).to(dtype)[:, None].repeat(1, 5).requires_grad_()
    found = key_bias(A, steps)
    wide = [each.detach().double().requires_grad_() for each in (A, steps)]
    exponent = wide[0] * F.softplus(wide[1])
    limit = torch.tensor(LARGEST_EXPONENT).double()
    exact = torch.where(exponent > limit, limit.exp() * (1 + exponent - limit), exponent.clamp(max=limit).exp())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(found.sum(), (A, steps)), torch.autograd.grad(exact.sum(), wide)
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for mine, other in zip(*gradients, strict=True):
        within = other.abs() < torch.finfo(dtype).max  # float16 ends at 65,504
        torch.testing.assert_close(mine.double()[within], other[within], rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("exponent", [88.0, 1000.0, 30_000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_large_exponents_trains_on(dtype, exponent):
    model = tiny_model(window=16, dtype=dtype).train()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.A.fill_(exponent)
    input_ids = tokens(2, 50)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def attention_case(dtype, spread):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    exponents = torch.rand(1, 2, 40, generator=generator) * spread
    states = (draw(1, 4, 40, 16), draw(1, 2, 40, 16), draw(1, 2, 40, 16))
    return [each.requires_grad_() for each in (*states, exponents)]


@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 8.0), (torch.float32, 30.0), (torch.float16, 8.0), (torch.float16, 12.0)]
)
@pytest.mark.parametrize("name", ["cpu_flash", "torch_sdpa"])
def test_a_backend_attends_by_large_biases_as_float64_does(name, dtype, spread):
    inputs = attention_case(dtype, spread)
    results = []
    for wide in (False, True):
        query, key, value, exponents = (each.detach().to(torch.float64 if wide else each.dtype) for each in inputs)
        own = [each.requires_grad_() for each in (query, key, value, exponents)]
        within = exponents.clamp(max=LARGEST_EXPONENT)
        bias = within.exp() * (1 + (exponents - within))
        if wide:
            scores = query @ key.repeat_interleave(2, 1).mT / 4 + bias.repeat_interleave(2, 1)[:, :, None]
            scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
            output = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
        else:
            output = BACKENDS[name].attend(query, key, value, bias, KeyWindow(64), None, None, 0.0)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
        results.append([output, *torch.autograd.grad((output * weights).sum(), own)])
    tolerance = 3e-2  # of a gradient, in which the rounding error of a weight is multiplied by e^10
    for mine, exact in zip(*results, strict=True):
        scale = exact.abs().max().clamp(min=1)
        torch.testing.assert_close(mine.double() / scale, exact / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("compile", [False, True], ids=["PyTorch", "compiled"])
def test_the_decoder_has_the_same_biases(compile):
    model = tiny_model(window=16)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.A.fill_(90.0)
    prompt = tokens(1, 20)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, 20:].tolist()
    assert Decoder(model, compile=compile).generate(prompt.tolist(), 12, eos_token_id=-1) == [expected]
