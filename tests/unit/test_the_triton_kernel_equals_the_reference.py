"""The attention kernels equal a dense reference, forward and backward, and see no key that a mask hides.

Triton's interpreter runs them on the CPU, in a process of its own: the switch holds for all of a process.
"""

import itertools
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from doge.model.attention import KeyWindow, dynamic_mask_attention, key_expiry, lifetimes
from doge.model.attention.backends import registry
from doge.model.attention.backends import triton_attention as triton_module
from doge.model.attention.backends.triton_attention import supports, triton_attention
from doge.model.attention.key_bias import key_bias
from doge.model.attention.layer import PADDED_KEY_BIAS
from doge.model.attention.triton_blocks import Blocks, Card, KernelBlocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(triton_module.triton is None, reason="needs triton")
interpreted = pytest.mark.skipif(
    not INTERPRETED or triton_module.triton is None, reason="run by test_all_of_it_under_the_interpreter"
)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the others")
def test_all_of_it_under_the_interpreter():
    own = Path(__file__).resolve()
    loss = f"{own.with_name('test_model_loss.py')}::test_the_loss_of_a_gpu_is_the_same"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(own), loss]
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
    assert supports(torch.zeros(1, 1, 4, 64)) == (INTERPRETED and triton_module.triton is not None)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [(48, torch.float16, "head_dim is 48"), (64, torch.float64, "torch.float64"), (64, torch.float16, "NVIDIA GPU")],
)
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the CPU")
def test_where_they_decline_pytorch_computes_and_the_reason_is_said(monkeypatch, head_dim, dtype, reason, caplog):
    monkeypatch.setattr(triton_module, "_card", lambda device: Card(75, 64 << 10))
    registry._warn_once.cache_clear()
    assert registry.choose_backend(torch.device("cuda"), dtype, head_dim, dropout=False).name == "torch_sdpa"
    assert [reason in record.message for record in caplog.records] == [True]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the CPU")
def test_an_nvidia_gpu_gets_them_unless_weights_are_dropped(monkeypatch):
    monkeypatch.setattr(triton_module, "_card", lambda device: Card(80, 163 << 10))
    names = [registry.choose_backend(torch.device("cuda"), torch.bfloat16, 64, drop).name for drop in (False, True)]
    assert names == ["triton", "torch_sdpa"]


def dense_attention(query, key, value, bias, expiry):
    """The definition with its mask materialised, in float64: (batch, seq, heads, head_dim)."""
    group, seq = query.shape[1] // key.shape[1], query.shape[2]
    key, value, bias = (x.double().repeat_interleave(group, dim=1) for x in (key, value, bias))
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    visible = (j <= i)[None, None]
    if expiry is not None:
        visible = visible & (i < expiry.repeat_interleave(group, dim=1)[:, :, None])
    visible = visible & (bias > PADDED_KEY_BIAS)[:, :, None]
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias[:, :, None]
    scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.masked_fill(~visible.any(-1, keepdim=True), 0).softmax(-1) * visible
    return (weights @ value).transpose(1, 2)


def random_inputs(seq, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, batch=1):
    """Query, key, value and bias that require gradients; as the model has them, transposed views, tokens first."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(batch, seq, kv_heads)]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    states[3] = states[3].exp()
    return [x.to(dtype if i < 3 else torch.float32).transpose(1, 2).requires_grad_() for i, x in enumerate(states)]


def windowed_expiry(bias, window, lengths=None):
    """Expiry (batch, kv_heads, seq) in int32 by a window of each document."""
    starts = [0, *torch.tensor(lengths or [bias.shape[-1]]).cumsum(0).tolist()]
    pieces = [key_expiry(bias[..., a:b], KeyWindow(window)) + a for a, b in itertools.pairwise(starts)]
    return torch.cat(pieces, dim=-1).int()


def compare(inputs, expiry, atol=2e-5, **given):
    """Outputs and the four gradients against the reference; returns the kernels' results.

    The kernels are given the expiry, or else what tells it.
    """
    weights = torch.randn(inputs[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (partial(triton_attention, **(given or {"expiry": expiry})), partial(dense_attention, expiry=expiry)):
        output = attend(*inputs)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, defined, name in zip(*results, ("output", "query", "key", "value", "bias"), strict=True):
        assert ours.dtype == (torch.float32 if name == "bias" else inputs[0].dtype)
        torch.testing.assert_close(
            ours.double(), defined.double(), atol=atol, rtol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    return results[0]


WIDE, TALL = Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def blocks(request, monkeypatch):
    """Small blocks of queries and keys, forward and backward: several of each kind in few tokens."""
    forward, backward = getattr(request, "param", (TALL, TALL))
    transposed = Blocks(backward.keys, backward.queries, *backward[2:])
    monkeypatch.setattr(triton_module, "choose_blocks", lambda *_: KernelBlocks(forward, backward, transposed))


@interpreted
@pytest.mark.parametrize(
    ("blocks", "batch", "heads", "kv_heads", "window"),
    [((TALL, TALL), 2, 1, 1, None), ((WIDE, TALL), 1, 2, 1, 20), ((WIDE, WIDE), 1, 4, 2, 20)],
    indirect=["blocks"],
)
def test_output_and_gradients_equal_the_definition(blocks, batch, heads, kv_heads, window):
    inputs = random_inputs(43, heads, kv_heads, batch=batch)
    compare(inputs, None if window is None else windowed_expiry(inputs[3], window))


@interpreted
@pytest.mark.parametrize("blocks", [(TALL, TALL), (WIDE, WIDE)], indirect=True, ids=["tall", "wide"])
def test_documents_end_by_expiry(blocks):
    lengths = [1, 15, 20, 60]
    inputs = random_inputs(96, heads=1)
    compare(inputs, windowed_expiry(inputs[3], 30, lengths))


def ends_of(*rows):
    """(batch, seq) int64: where each token's document ends, for rows of document lengths."""
    lengths = [torch.tensor(row) for row in rows]
    return torch.stack([each.cumsum(0).repeat_interleave(each) for each in lengths])


@interpreted
@pytest.mark.parametrize(
    ("rows", "blocks"),
    [(([1, 15, 20, 60], [96]), (TALL, TALL)), (([2, 70, 1], [40, 31, 2]), (WIDE, WIDE))],
    indirect=["blocks"],
    ids=["whole tall", "ragged wide"],
)
def test_ends_of_documents_do_for_the_expiry_of_every_key(blocks, rows, monkeypatch):
    from doge.model.attention import triton_tiles

    monkeypatch.setattr(
        triton_tiles, "CHUNK", triton_module.triton.language.constexpr(32)
    )  # of which a row has several
    ends = ends_of(*rows)
    inputs = random_inputs(ends.shape[1], batch=2)
    launched = []
    monkeypatch.setattr(triton_module, "run_forward", partial(triton_module.run_forward, launch=recorder(launched)))
    compare(inputs, ends[:, None].expand(-1, 1, -1), document_ends=ends)
    assert launched == ["attend"]  # no lists of key blocks are made for a layer


def recorder(launched):
    """A launch that notes the names of the kernels."""

    def launch(kernel, grid, *arguments, **options):
        launched.append(kernel.__name__)
        kernel[grid](*arguments, **options)

    return launch


@interpreted
@pytest.mark.parametrize("seq", [1, 16])
def test_any_length_will_do(seq):
    inputs = random_inputs(seq, heads=1)
    compare(inputs, windowed_expiry(inputs[3], 4))


@interpreted
def test_blocks_dead_between_living_ones_are_not_visited():
    """The first key lives for ever, as attention sinks do, and the keys 32 to 47 until 96; others see themselves."""
    from doge.model.attention.triton_launches import list_key_blocks

    expiry = torch.arange(1, 131).int()
    expiry[0], expiry[32:48] = 130, 96
    expiry = expiry.expand(2, 1, -1).contiguous()
    lists, counts = list_key_blocks(expiry, TALL)
    assert lists.shape == (2, 1, 5, 9)
    assert counts[1, 0].tolist() == [[0, 0], [0, 1], [1, 1], [0, 1], [0, 1]]  # without mask, with mask
    assert (lists[1, 0, 2, 0], lists[1, 0, 2, -1]) == (2, 0)


@interpreted
def test_a_query_that_sees_no_key_gives_zeros():
    inputs = random_inputs(50, heads=1)
    expiry = windowed_expiry(inputs[3], 8, [20, 30])
    expiry[..., 20:36] = torch.arange(20, 36)
    output, *gradients = compare(inputs, expiry)
    assert not output[:, 20:36].any()
    assert output[:, 19].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@interpreted
def test_a_padded_key_is_not_seen():
    inputs = random_inputs(40, heads=1)
    inputs[3] = inputs[3].detach().index_fill(2, torch.arange(10), PADDED_KEY_BIAS).requires_grad_()
    output, *_ = compare(inputs, None)
    assert not output[:, :10].any()


@interpreted
def test_half_precision_errs_by_its_rounding():
    """float16 only: the interpreter has no products of bfloat16."""
    inputs = random_inputs(40, heads=1, dtype=torch.float16, head_dim=64)
    assert not supports(inputs[0].bfloat16())
    compare(inputs, windowed_expiry(inputs[3], 20), atol=0.008)


@interpreted
@pytest.mark.parametrize("exponent", [8.0, 60.0])
def test_large_biases_leave_output_and_gradients_finite_and_right(exponent):
    inputs = random_inputs(40)
    steps = torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(2))
    inputs[3] = key_bias(torch.tensor(exponent), steps).detach().requires_grad_()
    compare(inputs, windowed_expiry(inputs[3], 20), atol=2e-3)


@interpreted
def test_head_dim_128_as_in_the_presets():
    inputs = [x.detach().contiguous().requires_grad_() for x in random_inputs(33, head_dim=128)]
    compare(inputs, windowed_expiry(inputs[3], 12))


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
def test_a_key_changes_nothing_for_queries_that_do_not_see_it():
    query, key, value, bias = (x.detach() for x in random_inputs(59, batch=2))
    expiry = windowed_expiry(bias, 12, [20, 39])
    before = triton_attention(query, key, value, bias, expiry)
    j = torch.tensor([3, 30, 41])
    key[1, :, j], value[1, :, j], bias[1, :, j] = 7, -9, 11
    after = triton_attention(query, key, value, bias, expiry)
    i = torch.arange(59)[:, None]
    sees = ((j <= i) & (i < expiry[1, 0, j])).any(-1)
    assert 0 < sees.sum() < 40
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, ~sees], after[1, ~sees])
    assert (before[1, sees] != after[1, sees]).any(-1).all()


@interpreted
@pytest.mark.parametrize(("window", "documents"), [(64, [43]), (7, [43]), (7, [20, 3, 20]), (64, [1, 42])])
def test_with_lifetimes_it_is_dynamic_mask_attention(documents, window):
    inputs = random_inputs(43, 4, 2, batch=1)
    lengths = torch.tensor(documents)
    ends = lengths.cumsum(0).repeat_interleave(lengths)[None] if len(documents) > 1 else None
    expiry = lifetimes(inputs[3], KeyWindow(window), ends)
    assert (expiry is None) == (window == 64 and ends is None)
    ours = compare(inputs, expiry)[0]
    torch.testing.assert_close(
        ours, dynamic_mask_attention(*inputs, window=window, document_ends=ends), atol=2e-5, rtol=0
    )


@interpreted
@pytest.mark.parametrize(("ended_by", "kv_heads"), [("nothing", 2), ("documents", 2), ("expiry", 1)])
def test_the_operations_are_what_they_tell_torch_compile(ended_by, kv_heads):
    inputs = random_inputs(17, heads=2, kv_heads=kv_heads)
    rows = [x.detach() for x in inputs]
    ends = ends_of([9, 8]) if ended_by == "documents" else None
    expiry = windowed_expiry(rows[3], 5) if ended_by == "expiry" else None
    torch.library.opcheck(triton_module._attend, (*inputs, expiry, ends))
    output, log_sum = triton_module._attend(*rows, expiry, ends)
    torch.library.opcheck(triton_module._backward, (output, output, log_sum, *rows, expiry, ends))


@interpreted
@pytest.mark.parametrize(("window", "documents"), [(64, None), (9, None), (64, [20, 3, 10])])
def test_compiled_attention_is_one_graph_and_equals_itself(window, documents):
    inputs = random_inputs(33)
    ends = ends_of(documents) if documents else None

    def attend(query, key, value, bias):
        backend = registry.BACKENDS["triton"]
        return backend.attend(query, key, value, bias, KeyWindow(window), ends, None, 0.0)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)
