"""Packed documents are the rows of few batches, so that threads share them and a hundred short ones are few calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doge.model.attention import document_groups
from doge.model.attention.backends import cpu_flash
from doge.model.attention.document_groups import group_documents
from doge.model.attention.window import KeyWindow


def groups_of(lengths, heads=1, threads=2):
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    return group_documents(tuple(starts), tuple(lengths), heads, threads)


def shapes(groups):
    return sorted(tuple(group.index.shape) for group in groups)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 16]), st.sampled_from([0, 10**9]))
def test_every_token_is_taken_once_and_put_back_where_it_lay(lengths, threads, call):
    tokens = torch.arange(1, sum(lengths) + 1).float().view(-1, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_groups, "CALL", call)
        group_documents.cache_clear()
        groups = groups_of(lengths, threads=threads)
    group_documents.cache_clear()
    target, seen = torch.zeros_like(tokens), []
    for group in groups:
        group.put(target, group.take(tokens))
        seen += [number for number in group.take_filled_with_zeros(tokens).flatten().tolist() if number]
    assert torch.equal(target, tokens)
    assert sorted(seen) == tokens.flatten().tolist()


def test_no_less_is_computed_than_alone_where_threads_have_work():
    assert shapes(groups_of([512, 512, 512, 512])) == [(4, 512)]
    assert shapes(groups_of([4096, 1024], heads=2)) == [(1, 1024), (1, 4096)]  # two heads are enough for two threads
    assert shapes(groups_of([4096, 3900], heads=1)) == [(2, 4096)]


def test_a_hundred_short_documents_are_few_calls(monkeypatch):
    calls = []
    flash = cpu_flash._flash
    monkeypatch.setattr(cpu_flash, "_flash", lambda *args, **kwargs: calls.append(args) or flash(*args, **kwargs))
    lengths = torch.tensor([18 + at % 5 for at in range(100)])
    ends = lengths.cumsum(0).repeat_interleave(lengths)[None]
    query, key, value = torch.randn(3, 1, 2, ends.shape[1], 16).unbind()
    cpu_flash.CpuFlash().attend(query, key, value, torch.zeros(1, 2, ends.shape[1]), KeyWindow(64), ends, None, 0.0)
    assert len(calls) <= 5
