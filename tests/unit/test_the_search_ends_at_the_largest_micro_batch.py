"""The search for the largest micro-batch, with an imagined memory, and what is remembered of it."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doge.common.storage import Storage
from doge.training.memory import fits, is_out_of_memory
from doge.training.micro_batch import find_micro_batch, probe_micro_batch
from doge.training.micro_batch_cache import MicroBatchCache

CIRCUMSTANCES = {"device": "NVIDIA GeForce RTX 4090", "sequence_length": 2048, "zero_stage": 1}


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 300))
def test_it_finds_the_largest_that_fits_in_few_tries(largest, most):
    tries = []

    def try_step(size):
        tries.append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with mock.patch("gc.collect"):  # half a second a size, late in a process of a thousand tests
        assert find_micro_batch(try_step, most) == min(largest, most)
    assert len(tries) == len(set(tries)) <= 2 * min(largest, most).bit_length() + 2
    assert max(tries) <= most


def test_another_error_ends_the_search():
    def try_step(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch(try_step, 8)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_processors_own_allocator_refuses_in_words_that_are_known():
    assert not fits(lambda: torch.empty(2**60, dtype=torch.uint8))


def test_what_a_failed_pass_held_is_free_again():
    class Held(torch.Tensor):
        alive = 0

        def __del__(self):
            Held.alive -= 1

    def work():
        held = torch.zeros(4).as_subclass(Held)
        Held.alive += 1
        circle = [held]
        circle.append(circle)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    Held.alive = 0
    assert not fits(work)
    assert Held.alive <= 0


def test_on_a_processor_the_given_size_is_taken():
    engine = SimpleNamespace(device=torch.device("cpu"))
    assert probe_micro_batch(engine, length=2048, most=64, default=8) == 8
    assert probe_micro_batch(engine, length=2048, most=3, default=8) == 3


def test_a_size_is_remembered_as_far_as_it_is_known(tmp_path):
    cache = MicroBatchCache(Storage(str(tmp_path)) / "micro_batches")
    assert cache.get(CIRCUMSTANCES, most=64) is None
    cache.put(CIRCUMSTANCES, 16, is_limit=False)  # sixteen fitted, and no more were asked for
    assert cache.get(CIRCUMSTANCES, most=16) == 16
    assert cache.get(CIRCUMSTANCES, most=4) == 4
    assert cache.get(CIRCUMSTANCES, most=17) is None
    cache.put(CIRCUMSTANCES, 21, is_limit=True)
    assert cache.get(CIRCUMSTANCES, most=64) == 21
    cache.put(CIRCUMSTANCES, 10, is_limit=True)  # lowered in the middle of a run
    assert cache.get(CIRCUMSTANCES, most=64) == 10
    assert cache.get(CIRCUMSTANCES, most=7) == 7
    assert cache.get(CIRCUMSTANCES | {"sequence_length": 4096}, most=7) is None


def test_a_damaged_entry_is_probed_again(tmp_path):
    cache = MicroBatchCache(Storage(str(tmp_path)))
    cache.put(CIRCUMSTANCES, 21, is_limit=True)
    for path in tmp_path.iterdir():
        path.write_text('{"micro_batch": ')
    assert cache.get(CIRCUMSTANCES, most=64) is None
