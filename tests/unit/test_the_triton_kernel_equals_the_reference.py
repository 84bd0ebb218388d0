"""The attention kernels equal a dense reference, forward and backward, and see no key that a mask hides.

Triton's interpreter runs them on the CPU, in a process of its own: the switch holds for all of a process.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import doge.triton_attention
from doge.attention import PADDED_KEY_BIAS, key_expiry
from doge.triton_attention import Blocks, supports, triton_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(doge.triton_attention.triton is None, reason="needs triton")
interpreted = pytest.mark.skipif(
    not INTERPRETED or doge.triton_attention.triton is None, reason="run by test_all_of_it_under_the_interpreter"
)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the others")
def test_all_of_it_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout


def test_it_declines_what_no_kernel_takes():
    for states in (torch.zeros(1, 1, 4, 48), torch.zeros(1, 1, 4, 512), torch.zeros(1, 1, 4, 64, dtype=torch.float64)):
        assert not supports(states)
        with pytest.raises(ValueError, match="head_dim"):
            triton_attention(states, states, states, states[..., 0], None)
    assert supports(torch.zeros(1, 1, 4, 64)) == (INTERPRETED and doge.triton_attention.triton is not None)


def dense_attention(query, key, value, bias, expiry):
    """The definition with its mask materialised, in float64: (batch, seq, heads, head_dim)."""
    group, seq = query.shape[1] // key.shape[1], query.shape[2]
    key, value, bias = (x.double().repeat_interleave(group, dim=1) for x in (key, value, bias))
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    visible = (j <= i)[None, None]
    if expiry is not None:
        visible = visible & (i < expiry.repeat_interleave(group, dim=1)[:, :, None])
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias[:, :, None]
    scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.masked_fill(~visible.any(-1, keepdim=True), 0).softmax(-1) * visible
    return (weights @ value).transpose(1, 2)


def random_inputs(seq, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, batch=2):
    """Query, key, value and bias that require gradients; as the model has them, transposed views, tokens first."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(batch, seq, kv_heads)]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    states[3] = states[3].exp()
    return [x.to(dtype if i < 3 else torch.float32).transpose(1, 2).requires_grad_() for i, x in enumerate(states)]


def document_ends(lengths):
    """(seq,): for every token the end of its document."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.repeat_interleave(ends, torch.tensor(lengths)).int()


def windowed_expiry(bias, window, lengths=None):
    """Expiry (batch, kv_heads, seq) in int32 by a window of each document."""
    starts = [0, *torch.tensor(lengths or [bias.shape[-1]]).cumsum(0).tolist()]
    pieces = [key_expiry(bias[..., a:b], window) + a for a, b in itertools.pairwise(starts)]
    return torch.cat(pieces, dim=-1).int()


def compare(inputs, expiry, atol=2e-5):
    """Outputs and the four gradients against the reference; returns the kernels' results."""
    weights = torch.randn(inputs[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (triton_attention, dense_attention):
        output = attend(*inputs, expiry)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, defined, name in zip(*results, ("output", "query", "key", "value", "bias"), strict=True):
        assert ours.dtype == (torch.float32 if name == "bias" else inputs[0].dtype)
        torch.testing.assert_close(
            ours.double(), defined.double(), atol=atol, rtol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    return results[0]


WIDE, TALL = Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1)


@pytest.fixture(params=[(TALL, TALL), (WIDE, TALL), (WIDE, WIDE)], ids=["tall", "mixed", "wide"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(doge.triton_attention, "choose_blocks", lambda query: request.param)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("window", [None, 20])
def test_output_and_gradients_equal_the_definition(blocks, heads, kv_heads, window):
    inputs = random_inputs(75, heads, kv_heads)
    compare(inputs, None if window is None else windowed_expiry(inputs[3], window))


@interpreted
@pytest.mark.parametrize("lengths", [[96], [64, 32], [1, 50, 40, 5], [33, 63]])
def test_documents_end_by_expiry(blocks, lengths):
    inputs = random_inputs(96)
    compare(inputs, document_ends(lengths).expand(2, 1, -1))
    compare(inputs, windowed_expiry(inputs[3], 9, lengths))


@interpreted
@pytest.mark.parametrize("seq", [1, 15, 16, 33])
def test_any_length_will_do(blocks, seq):
    inputs = random_inputs(seq)
    compare(inputs, None)
    compare(inputs, windowed_expiry(inputs[3], 4))


@interpreted
def test_blocks_dead_between_living_ones_are_not_visited():
    """The first key lives for ever, as attention sinks do, and the keys 32 to 47 until 96; others see themselves."""
    expiry = torch.arange(1, 131).int()
    expiry[0], expiry[32:48] = 130, 96
    expiry = expiry.expand(2, 1, -1).contiguous()
    lists, counts = doge.triton_attention._list_key_blocks(expiry, 130, TALL)
    assert lists.shape == (2, 1, 5, 9)
    assert counts[1, 0].tolist() == [[0, 0], [0, 1], [1, 1], [0, 1], [0, 1]]  # without mask, with mask
    assert (lists[1, 0, 2, 0], lists[1, 0, 2, -1]) == (2, 0)


@interpreted
def test_a_query_that_sees_no_key_gives_zeros(blocks):
    inputs = random_inputs(50)
    expiry = windowed_expiry(inputs[3], 8)
    expiry = torch.minimum(expiry, torch.where(torch.arange(50) < 20, 20, 50)).int()
    expiry[..., 20:36] = torch.arange(20, 36)
    output, *gradients = compare(inputs, expiry)
    assert not output[:, 20:36].any()
    assert output[:, 19].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@interpreted
def test_padded_keys_are_not_seen_and_padded_queries_stay_finite():
    inputs = random_inputs(40)
    inputs[3] = inputs[3].detach().index_fill(2, torch.arange(10), PADDED_KEY_BIAS).requires_grad_()
    compare(inputs, None)


@interpreted
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_half_precision_errs_by_its_rounding(dtype, atol):
    inputs = random_inputs(40, dtype=dtype, head_dim=64)
    compare(inputs, windowed_expiry(inputs[3], 20), atol)


@interpreted
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_widths_of_the_presets(head_dim):
    inputs = random_inputs(40, head_dim=head_dim)
    assert supports(inputs[0])
    compare([x.detach().contiguous().requires_grad_() for x in inputs], windowed_expiry(inputs[3], 12))
    compare([x.detach().requires_grad_() for x in inputs], None)


@interpreted
def test_gradients_of_any_layout_will_do():
    """`sum` hands an expanded gradient back, and channels need not lie side by side."""
    inputs = random_inputs(20)
    inputs = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in inputs]
    results = [
        torch.autograd.grad(attend(*inputs, None).sum(), inputs) for attend in (triton_attention, dense_attention)
    ]
    for ours, defined in zip(*results, strict=True):
        torch.testing.assert_close(ours, defined, atol=2e-5, rtol=2e-5)


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 30), st.integers(0, 49), st.integers(0, 1))
def test_a_key_changes_nothing_for_queries_that_do_not_see_it(seq, window, j, row):
    j %= seq
    query, key, value, bias = (x.detach() for x in random_inputs(seq))
    expiry = windowed_expiry(bias, window)
    before = triton_attention(query, key, value, bias, expiry)
    key[row, :, j], value[row, :, j], bias[row, :, j] = 7, -9, 11
    after = triton_attention(query, key, value, bias, expiry)
    i = torch.arange(seq)
    sees = (j <= i) & (i < expiry[row, 0, j])
    assert torch.equal(before[1 - row], after[1 - row])
    assert torch.equal(before[row, ~sees], after[row, ~sees])
    assert not sees.any() or not torch.equal(before[row, sees], after[row, sees])
