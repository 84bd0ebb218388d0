"""On a GPU: Liger's loss and gradients are those of the chunked ones of PyTorch."""

import pytest
import torch

from doge.model.loss import IGNORE_INDEX, linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("tokens", [3, 5000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_both_give_the_same(dtype, tolerance, tokens):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 256, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(32768, 256, device="cuda") / 16).to(dtype).requires_grad_()
    targets = torch.randint(0, 32768, (tokens,), device="cuda")
    targets[::3] = IGNORE_INDEX
    results = []
    for chunk in (None, 256):  # with a chunk asked for it is PyTorch that computes
        loss = linear_cross_entropy(hidden, weight, targets, chunk)
        results.append((loss, *torch.autograd.grad(loss / tokens, (hidden, weight))))
    for liger, exact in zip(*results, strict=True):
        assert (liger.float() - exact.float()).norm() <= tolerance * exact.float().norm()
