"""The Triton kernels compile for every card with the block sizes chosen there, and fit: no GPU is needed to know it.

They are compiled by `benchmarks/gpu_blocks.py`, in a process of its own: the interpreter's switch holds for a process.
"""

import ast
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from doge.model.attention.triton_blocks import Card, choose_blocks

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "doge/model/attention/triton_kernels.py"
KERNELS = {
    each.name
    for each in ast.parse(SOURCE.read_text()).body
    if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")
}
CARDS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # shared memory of a block of threads, bytes
SPILLED = 16  # bytes a thread may spill at most
RAGGED_SPILLED = 128  # the same where a length is no multiple of the blocks, so that every load has a mask
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compiled(*options, most_spilled=SPILLED):
    """The rows of the kernels that were compiled, each of which fits."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_blocks.py"), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    for row in rows:
        assert row["shared_memory"] <= CARDS[int(row["card"].removeprefix("sm_"))], row
        assert row["spilled_bytes"] <= most_spilled, row
        assert row["registers"] <= 255, row
        assert row["occupancy"] > 0, row
    return rows


@needs_triton
def test_the_kernels_of_a_training_step_fit_a_hopper():
    names = ["attend", "differentiate_key"]
    rows = compiled("--cards", 90, "--ends", "documents", "--kernels", *names)
    assert [row["kernel"] for row in rows] == names


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_of_the_presets_fits(card):
    assert {row["kernel"] for row in compiled("--cards", card)} == KERNELS


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "options",
    [("--head-dim", 16), ("--head-dim", 64), ("--head-dim", 256), ("--dtype", "fp16")],
    ids=lambda options: " ".join(map(str, options)),
)
def test_other_widths_and_dtypes_fit(options):
    assert len(compiled(*options, "--ends", "documents")) == (len(KERNELS) - 1) * len(CARDS)  # no list is filled


@pytest.mark.slow
@needs_triton
def test_a_length_that_blocks_do_not_divide_spills_little():
    compiled("--sequence-length", 1999, "--ends", "documents", most_spilled=RAGGED_SPILLED)


def test_block_sizes_are_chosen_by_the_card_alone():
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float32), (16, 32, 64, 128, 256)):
        for architecture, shared_memory in CARDS.items():
            for blocks in choose_blocks(Card(architecture, shared_memory), dtype, head_dim):
                assert all(number & (number - 1) == 0 and number >= 16 for number in blocks[:2])
        assert choose_blocks(None, dtype, head_dim) == choose_blocks(Card(90, CARDS[90]), torch.float32, head_dim)
    of = {
        architecture: choose_blocks(Card(architecture, shared), torch.float16, 128)
        for architecture, shared in CARDS.items()
    }
    assert len(set(of.values())) == 3
    assert choose_blocks(Card(120, 99 << 10), torch.float16, 128) == of[89]
    assert choose_blocks(Card(100, 227 << 10), torch.float16, 128) == of[90]
