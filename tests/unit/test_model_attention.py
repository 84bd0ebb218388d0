"""Dynamic mask attention equals its definition, forward and backward, in memory linear in the length."""

import math
from unittest import mock

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import logits_of, tiny_model, tokens

from doge.model.attention import (
    KeyWindow,
    document_ends,
    dynamic_mask_attention,
    gathered_chunks,
    kept_keys,
    key_expiry,
    lifetimes,
)
from doge.model.attention.backends import cpu_flash, torch_sdpa
from doge.model.attention.documents import document_lengths


def defined_attention(query, key, value, bias, window):
    """The definition, row by row: (batch, seq, heads, head_dim), in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    bias = bias.repeat_interleave(groups, dim=1)
    rows = []
    for i in range(query.shape[2]):
        scores = torch.einsum("bhd,bhkd->bhk", query[:, :, i], key[:, :, : i + 1]) / math.sqrt(query.shape[-1])
        scores = scores + bias[:, :, : i + 1]
        kept = bias[:, :, : i + 1].topk(min(window, i + 1)).indices
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, kept, False)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        rows.append(torch.einsum("bhk,bhkd->bhd", weights, value[:, :, : i + 1]))
    return torch.stack(rows, dim=1)


def defined_for_documents(query, key, value, bias, window, documents):
    if documents is None:
        return defined_attention(query, key, value, bias, window)
    batch, _, seq, _ = query.shape
    streams = [x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2) for x in (query, key, value)]
    streams.append(bias.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2))
    parts = zip(*(stream.split(documents, dim=2) for stream in streams), strict=True)
    return torch.cat([defined_attention(*part, window) for part in parts], dim=1).view(batch, seq, query.shape[1], -1)


def random_inputs(seq, dtype=torch.float32, head_dim=16, batch=2, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(seq)
    shapes = [(batch, n, seq, head_dim) for n in (heads, kv_heads, kv_heads)] + [(batch, kv_heads, seq)]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    states[3] = states[3].exp()
    return [x.to(dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(states)]


def ends_of(documents, batch):
    """(batch, seq) ends, from lengths over the rows laid end to end."""
    if documents is None:
        return None
    ends = torch.tensor(documents).cumsum(0).repeat_interleave(torch.tensor(documents)).view(batch, -1)
    return ends - torch.arange(batch)[:, None] * ends.shape[1]


def on_the_cpu(*inputs, window, documents=None):
    return dynamic_mask_attention(*inputs, window=window, document_ends=ends_of(documents, len(inputs[0])))


def by_sdpa_attention(*inputs, window, documents=None):
    return torch_sdpa.TorchSdpa().attend(*inputs, KeyWindow(window), ends_of(documents, len(inputs[0])), None, 0.0)


BACKENDS = pytest.mark.parametrize("backend", [on_the_cpu, by_sdpa_attention])


@BACKENDS
@pytest.mark.parametrize("head_dim", [6, 16, 20])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, [33, 3, 30], [10, 23, 1, 32]])
@pytest.mark.parametrize("window", [64, 7])
def test_output_and_gradients_equal_the_definition(monkeypatch, window, documents, kv_heads, head_dim, backend):
    for module in (cpu_flash, torch_sdpa):
        monkeypatch.setattr(module, "QUERY_CHUNK", 11)
    inputs = random_inputs(33, head_dim=head_dim, kv_heads=kv_heads)
    weights = torch.randn(2, 33, 4, head_dim, generator=torch.Generator().manual_seed(9))
    results = []
    for output in (
        backend(*inputs, window=window, documents=documents),
        defined_for_documents(*inputs, window, documents),
    ):
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, defined, name in zip(*results, ("output", "query", "key", "value", "bias"), strict=True):
        torch.testing.assert_close(ours, defined, atol=5e-5, rtol=1e-4, msg=name)
    assert results[0][4].abs().max() > 1e-3  # the bias has a gradient to compare


def test_bfloat16_keeps_the_bias_to_sixteen_bits():
    """Biases near 100 that differ by less than a bfloat16 step: rounding them once would move weights by 30 %."""
    inputs = random_inputs(40, torch.bfloat16)
    bias = 100 + torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(5))
    output = dynamic_mask_attention(*inputs[:3], bias, window=64)
    defined = defined_attention(*(x.float() for x in inputs[:3]), bias, window=64)
    assert (output.float() - defined).abs().mean() < 0.004


WINDOWS = st.builds(
    lambda room, sinks, local: KeyWindow(room + sinks + local, sinks, local),
    st.integers(1, 30),
    st.integers(0, 4),
    st.integers(0, 4),
)


@pytest.mark.parametrize("documents", [None, [1]])
def test_one_token_of_one_head_attends_to_itself(documents):
    inputs = random_inputs(1, batch=1, heads=1, kv_heads=1)
    output = on_the_cpu(*inputs, window=4, documents=documents)
    torch.testing.assert_close(output[0, 0, 0], inputs[2][0, 0, 0])


@pytest.mark.parametrize("chunk", [7, 10])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("documents", [None, [66, 33, 3, 30]])
def test_chunks_of_a_kernel_equal_the_whole(documents, kv_heads, chunk):
    """With a kernel that knows whole sequences only."""
    lengths = []

    def attend(query, key, value, bias, expiry):
        seq = query.shape[2]
        lengths.append(seq)
        i, j = torch.arange(seq)[:, None], torch.arange(seq)
        mask = torch.where((j <= i) & (i < expiry[:, :, None]), bias[:, :, None], -math.inf)
        groups = query.shape[1] // key.shape[1]
        key, value, mask = (states.repeat_interleave(groups, dim=1) for states in (key, value, mask))
        mask = mask.masked_fill(mask.isneginf().all(-1, keepdim=True), 0)  # where a query sees nothing, as the kernel
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    inputs, window = random_inputs(66, kv_heads=kv_heads), 7
    expiry = lifetimes(inputs[3], KeyWindow(window), ends_of(documents, batch=2))
    results = []
    for output in (
        gathered_chunks.attend_gathered_chunks(attend, *inputs, expiry, window, chunk),
        defined_for_documents(*inputs, window, documents),
    ):
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert max(lengths) == window + chunk
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("documents", [None, [33, 3, 30]])
def test_the_operation_is_what_it_tells_torch_compile(documents, kv_heads):
    query, key, value, bias = random_inputs(33, kv_heads=kv_heads)
    ends = ends_of(documents, batch=2)
    torch.library.opcheck(cpu_flash._attend, (query, key, value, bias, ends, None, 7, 0, 0))
    rows = [x.detach() for x in (query, key, value, bias)]
    output, wide, sums = cpu_flash._attend(*rows, ends, None, 7, 0, 0)
    torch.library.opcheck(cpu_flash._backward, (output, wide, sums, *rows, ends, None, 7, 0, 0))


def test_float16_bears_padding():
    model, row = tiny_model(dtype=torch.float16), tokens(1, 9)
    padded = torch.cat([torch.full((1, 4), 2), row], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    found = logits_of(model, padded, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(found, logits_of(model, row), atol=0.02, rtol=0)


@pytest.mark.parametrize("train", [False, True])
def test_autocast_computes_in_bfloat16(train):
    model, input_ids = tiny_model(window=16).train(train), tokens(2, 40)
    exact = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert 0 < abs(loss - exact) < 0.02
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), WINDOWS, st.sampled_from([1, 3, 128]))
def test_each_key_lives_exactly_while_it_is_among_the_largest(bias, window, block):
    """Against brute force, with many ties: of equal biases the later key is kept."""
    with mock.patch("doge.model.attention.window.BLOCK", block):
        expiry = key_expiry(torch.tensor(bias, dtype=torch.float32), window).tolist()
    for i in range(len(bias)):
        forced = {j for j in range(i + 1) if j < window.num_sinks or j > i - window.num_local}
        others = sorted(set(range(i + 1)) - forced, key=lambda j: (bias[j], j), reverse=True)
        best = sorted([*forced, *others[: window.size - len(forced)]])
        assert [j for j in range(i + 1) if i < expiry[j]] == best
        assert kept_keys(torch.tensor(bias[: i + 1], dtype=torch.float32), window).tolist() == best


DOCUMENTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99), DOCUMENTS, WINDOWS)
def test_lifetimes_in_documents_are_those_of_each_document_alone(seed, documents, window):
    seq = sum(documents)
    bias = torch.randint(-2, 3, (2, 2, seq), generator=torch.Generator().manual_seed(seed)).float()
    ends = torch.tensor(documents).cumsum(0).repeat_interleave(torch.tensor(documents)).expand(2, -1)
    begin, expected = 0, []
    for part in bias.split(documents, dim=-1):
        expected.append(key_expiry(part, window) + begin)
        begin += part.shape[-1]
    assert torch.equal(lifetimes(bias, window, ends), torch.cat(expected, dim=-1))


def test_lifetimes_wait_for_no_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # whose tensors have no values that could be read
        ends = torch.empty(2, 40, dtype=torch.int64)
        assert lifetimes(torch.empty(2, 3, 40), KeyWindow(7), ends).shape == (2, 3, 40)


def test_expiry_keeps_rows_and_heads_apart():
    bias, window = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0)), KeyWindow(5)
    expiry = key_expiry(bias, window)
    for row in range(3):
        for head in range(2):
            assert torch.equal(expiry[row, head], key_expiry(bias[row, head], window))


@pytest.mark.parametrize("moe", [False, True])
def test_below_the_window_no_tensor_has_the_length_twice(moe):
    seq = 101  # no other size of the model
    model = tiny_model(moe).train()
    input_ids = tokens(2, seq)
    with Allocations() as allocations:
        model(input_ids, labels=input_ids).loss.backward()
    assert any(seq in shape for shape, _ in allocations.results)
    assert not [shape for shape, _ in allocations.results if shape.count(seq) > 1]


def test_the_watch_would_see_a_square_mask():
    seq = 101
    with Allocations() as allocations:
        by_sdpa_attention(*random_inputs(seq), window=16)
    assert [shape for shape, _ in allocations.results if shape.count(seq) > 1]


def test_beyond_the_window_masks_are_a_chunk_of_queries_tall(monkeypatch):
    monkeypatch.setattr(cpu_flash, "QUERY_CHUNK", 10)
    seq = 101
    model = tiny_model(window=16).train()
    input_ids = tokens(1, seq)
    with Allocations() as allocations:
        model(input_ids, labels=input_ids).loss.backward()
    assert not [shape for shape, _ in allocations.results if shape.count(seq) > 1]


@BACKENDS
def test_beyond_the_window_no_mask_waits_for_the_backward_pass(backend):
    saved = []
    inputs = random_inputs(40)

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backend(*inputs, window=7)
    assert any(40 in shape for shape in saved)
    assert not [shape for shape in saved if len(shape) == 4 and shape[-1] > 24]


@pytest.mark.parametrize(
    ("positions", "ends"),
    [
        ([[0, 1, 2, 3]], None),
        ([[5, 6, 7, 8]], None),
        ([[0, 1, 0, 1]], [[2, 2, 4, 4]] * 2),
        ([[0, 1, 2, 3], [0, 1, 2, 0]], [[4, 4, 4, 4], [3, 3, 3, 4]]),
        ([[2, 3, 0, 0], [0, 1, 2, 3]], [[2, 2, 3, 4], [4, 4, 4, 4]]),
    ],
)
def test_a_document_starts_where_positions_do_not_go_on(positions, ends):
    found = document_ends(torch.tensor(positions), batch=2)
    assert (found if found is None else found.tolist()) == ends
    if ends is not None:
        lengths = document_lengths(found)
        assert torch.equal(ends_of(lengths, 2), found)
