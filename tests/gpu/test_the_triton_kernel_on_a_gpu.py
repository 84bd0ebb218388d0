"""On a GPU: the attention kernels err by no more than the rounding of their dtype, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from doge.model.attention import KeyWindow, key_expiry
from doge.model.attention.backends.triton_attention import supports, triton_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def masked_attention(query, key, value, bias, expiry):
    """PyTorch's attention in float32 under the mask itself: (batch, seq, heads, head_dim)."""
    group, seq = query.shape[1] // key.shape[1], query.shape[2]
    key, value, bias = (x.float().repeat_interleave(group, dim=1) for x in (key, value, bias))
    i, j = torch.arange(seq, device="cuda")[:, None], torch.arange(seq, device="cuda")
    visible = (j <= i)[None, None]
    if expiry is not None:
        visible = visible & (i < expiry.repeat_interleave(group, dim=1)[:, :, None])
    mask = torch.where(visible, bias[:, :, None], -torch.inf)
    return F.scaled_dot_product_attention(query.float(), key, value, attn_mask=mask).transpose(1, 2)


def random_inputs(seq, heads, kv_heads, head_dim, dtype):
    """Query, key, value and bias of two rows, as the model has them: transposed views, tokens first."""
    torch.manual_seed(seq)
    shapes = [(2, seq, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(2, seq, kv_heads)]
    states = [torch.randn(shape, device="cuda") for shape in shapes]
    states[3] = states[3].exp()
    return [x.to(dtype if i < 3 else torch.float32).transpose(1, 2).requires_grad_() for i, x in enumerate(states)]


def errors(inputs, expiry, **given):
    """Relative errors of the output and of the four gradients; the kernels are given the expiry, or what tells it."""
    weights = torch.randn_like(inputs[0].transpose(1, 2))
    results = []
    for attend, ended in ((triton_attention, given or {"expiry": expiry}), (masked_attention, {"expiry": expiry})):
        output = attend(*inputs, **ended)
        results.append((output, *torch.autograd.grad((output.float() * weights.float()).sum(), inputs)))
    names = ("output", "query", "key", "value", "bias")
    return {
        name: float((ours.float() - exact.float()).norm() / exact.float().norm())
        for name, ours, exact in zip(names, *results, strict=True)
    }


@pytest.mark.parametrize(
    ("seq", "heads", "kv_heads", "head_dim", "dtype", "window", "limit"),
    [
        (2048, 8, 4, 128, torch.bfloat16, 1024, 1e-2),
        (2048, 2, 1, 64, torch.bfloat16, 1024, 1e-2),
        (1999, 4, 4, 128, torch.bfloat16, 300, 1e-2),
        (777, 2, 1, 64, torch.float16, None, 2e-3),
        (200, 2, 1, 16, torch.bfloat16, 50, 1e-2),
        (200, 2, 1, 256, torch.bfloat16, 50, 1e-2),
        (300, 2, 1, 128, torch.float32, 100, 1e-5),
        (300, 2, 1, 256, torch.float32, None, 1e-5),
    ],
)
def test_it_errs_by_its_rounding(seq, heads, kv_heads, head_dim, dtype, window, limit):
    inputs = random_inputs(seq, heads, kv_heads, head_dim, dtype)
    assert supports(inputs[0])
    expiry = None if window is None else key_expiry(inputs[3], KeyWindow(window)).int()
    found = errors(inputs, expiry)
    assert max(found.values()) < limit, found


def test_packed_documents_see_only_themselves():
    inputs = random_inputs(2048, 4, 2, 128, torch.bfloat16)
    lengths = torch.tensor([700, 3, 1000, 345], device="cuda")
    ends = lengths.cumsum(0).repeat_interleave(lengths).int().expand(2, 2, -1)
    for given in ({}, {"document_ends": ends[:, 0]}):
        found = errors(inputs, ends, **given)
        assert max(found.values()) < 1e-2, found


def test_the_backward_pass_is_deterministic():
    inputs = random_inputs(1024, 4, 2, 128, torch.bfloat16)
    expiry = key_expiry(inputs[3], KeyWindow(200)).int()
    results = [torch.autograd.grad(triton_attention(*inputs, expiry).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
