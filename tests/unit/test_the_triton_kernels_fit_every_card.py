"""The Triton kernels compile for every card with the block sizes chosen there, and fit: no GPU is needed to know it.

They are compiled by `benchmarks/gpu_blocks.py`, each once for what is asked of it, since that takes a second or two.
"""

import ast
import functools
import importlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from doge.model.attention.triton_blocks import Card, choose_blocks

ROOT = Path(__file__).parents[2]
CARDS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # shared memory of a block of threads, bytes
KERNELS = ("attend", "differentiate_query", "differentiate_key")  # whose blocks are chosen
SPILLED = 16  # bytes a thread may spill at most
RAGGED_SPILLED = 128  # the same where a length is no multiple of the blocks, so that every load has a mask
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton"
)


@functools.cache
def compiled(card, kernel, ends="documents", *options):
    """The row of a kernel that was compiled, which fits but for what it spills."""
    if (scripts := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(scripts)
    gpu_blocks = importlib.import_module("gpu_blocks")
    arguments = ("--cards", card, "--kernels", kernel, "--ends", ends, "--batch", 1, *options)
    (row,) = gpu_blocks.rows(gpu_blocks.parse([str(each) for each in arguments]))
    assert (row["kernel"], row["card"]) == (kernel, f"sm_{card}")
    assert row["shared_memory"] <= CARDS[card], row
    assert row["registers"] <= 255, row
    assert row["occupancy"] > 0, row
    return row


def fits(*asked, most_spilled=SPILLED) -> None:
    assert (row := compiled(*asked))["spilled_bytes"] <= most_spilled, row


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("kernel", ["attend", "differentiate_key"])
def test_the_kernels_of_a_training_step_fit_a_hopper(kernel):
    fits(90, kernel)


def test_every_kernel_is_looked_at():
    functions = ast.parse((ROOT / "doge/model/attention/triton_kernels.py").read_text()).body
    names = {each.name for each in functions if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")}
    assert names == {*KERNELS, "fill_lists", "sum_output_products"}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_of_the_presets_fits(card):
    """But for keys that end by nothing on older cards: those kernels are the ones of documents without one loop."""
    for kernel in KERNELS:
        fits(card, kernel)
        if card == 90:
            fits(card, kernel, "nothing")
    for kernel in ("fill_lists", "attend", "differentiate_query"):  # keys are differentiated as with documents
        fits(card, kernel, "expiry")
    fits(card, "sum_output_products")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("card", "options"),
    [
        (80, ("--head-dim", 16, "--dtype", "fp16")),
        (89, ("--head-dim", 64)),  # less memory than that of 80, and the same instructions and blocks
        (90, ("--head-dim", 64, "--dtype", "fp16")),
        (89, ("--head-dim", 256)),
        (90, ("--head-dim", 256)),
    ],
    ids=str,
)
def test_other_widths_and_dtypes_fit(card, options):
    """Every other row of the table of block sizes, on the card that it is narrowest on, of either instruction set."""
    for kernel in KERNELS:
        fits(card, kernel, "documents", *options)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("card", [80, 90])  # those of 89 are those of 80 but for the stages
def test_a_length_that_blocks_do_not_divide_spills_little(card):
    for kernel in KERNELS:
        fits(card, kernel, "documents", "--sequence-length", 1999, most_spilled=RAGGED_SPILLED)


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
