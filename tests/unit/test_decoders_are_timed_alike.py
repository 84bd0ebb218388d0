"""`benchmarks/one_row.py`: every side is timed by its tokens, and its bytes are those that it reads."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tokens

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def one_row(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import one_row

    monkeypatch.setattr(one_row, "PROMPT", 8)
    monkeypatch.setattr(one_row, "NEW", 6)
    return one_row


def test_every_side_tells_of_each_token_and_transformers_gives_ours(one_row):
    from transformers import DogeForCausalLM

    ours = tiny_model()
    theirs = DogeForCausalLM(ours.config)
    theirs.load_state_dict(ours.state_dict())
    prompt = tokens(1, 8)[0].tolist()
    with contextlib.ExitStack() as stack:
        sides = one_row.open_sides(ours, theirs.eval(), "fp32", False, stack)
    seen = dict.fromkeys(sides, 0)
    for name, side in sides.items():

        def count(name=name):
            seen[name] += 1

        side.generate(prompt, count)
    assert seen == {"ours": 6, "transformers": 6}
    speeds, found = one_row.compare(sides, prompt, rounds=1)
    assert found["ours"] == found["transformers"]
    assert min(speeds.values()) > 0
    assert sides["ours"].bytes_read == sides["transformers"].bytes_read


def test_int8_counts_a_byte_a_weight_and_a_scale_a_row(one_row):
    from doge.generation.int8 import Int8

    model = tiny_model()
    saved = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "dt_proj" not in name:
            matrix = Int8.of(parameter)
            saved += parameter.nbytes - matrix.data.nbytes - matrix.scale.nbytes
    assert one_row.weight_bytes(model, False) - one_row.weight_bytes(model, True) == saved > 0


def test_the_bandwidth_is_that_of_a_read_that_no_cache_holds(one_row, monkeypatch):
    import memory_bandwidth

    sizes = []
    ones = torch.ones
    monkeypatch.setattr(memory_bandwidth, "last_level_cache", lambda: 2**30)
    monkeypatch.setattr(memory_bandwidth.torch, "ones", lambda number: sizes.append(4 * number) or ones(8))
    assert memory_bandwidth.read_bandwidth(reads=1) > 0
    assert sizes == [4 * 2**30]


def test_without_llama_cpp_one_sentence_says_what_to_install(one_row, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[benchmarks\]'.*--without-llama-cpp"):
        one_row.measure([], 1, llama=True)
