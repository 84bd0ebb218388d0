"""On a GPU: the probe finds what brute force finds, leaves no trace, and running out of memory ends no run."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from doge.model.configuration import ModelRecipe
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.memory import fits
from doge.training.micro_batch import probe_micro_batch
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTH = 2048
MEMORY = 12 * 2**30  # bytes that the tests pretend the GPU has, so that brute force ends


@pytest.fixture(autouse=True)
def group():
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pretended_memory(monkeypatch):
    """Little memory, both for the allocator and for who asks how much there is; bytes."""
    free, total = torch.cuda.mem_get_info()
    memory = min(MEMORY, free)
    allow = torch.cuda.set_per_process_memory_fraction
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (memory - torch.cuda.memory_reserved(), total))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device=None: allow(min(part, memory / total))
    )
    allow(memory / total)
    yield memory
    allow(1.0)


def build(preset: str, stage: int = 1) -> Engine:
    recipe = EngineRecipe(stage, "auto")
    return Engine(NextTokenPrediction(ModelRecipe(preset)), OptimizerRecipe(), recipe, torch.device("cuda", 0))


def share(sequences: int) -> TensorBatch:
    tokens = torch.randint(0, 32768, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(sequences, -1)
    return TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": positions})


@pytest.mark.parametrize("preset", ["Doge-160M", "Doge-320M"])
def test_it_is_within_one_of_what_brute_force_finds(preset, pretended_memory):
    engine = build(preset)
    largest = 0
    while fits(partial(engine.rehearse, largest + 1, LENGTH)):
        largest += 1
        torch.cuda.empty_cache()
    before = engine.state()
    found = probe_micro_batch(engine, LENGTH, most=512, default=1)
    after = engine.state()
    assert largest - 1 <= found <= largest
    assert before.step == after.step
    for name, value in before.parameters.items():
        assert torch.equal(after.parameters[name], value)
        assert all(torch.equal(after.moments[key][name], values[name]) for key, values in before.moments.items())
    result = engine.step(share(2 * found), [found, found], 1.0)
    assert result.micro_batch_limit is None
    engine.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_found_for_partitioned_models_fits_their_step(stage, pretended_memory):
    engine = build("Doge-160M", stage)
    found = probe_micro_batch(engine, LENGTH, most=512, default=1)
    for _ in range(2):
        engine.step(share(2 * found), [found, found], 1.0)
    engine.close()


@pytest.mark.parametrize("preset", ["Doge-160M", "Doge-320M"])
def test_a_step_that_runs_out_of_memory_is_repeated_and_the_same(preset, pretended_memory):
    engine = build(preset)
    found = probe_micro_batch(engine, LENGTH, most=512, default=1)
    state = engine.state()
    too_large = 2 * found + 2
    batch = share(too_large)
    disturbed = engine.step(batch, [too_large], 1.0)
    assert disturbed.micro_batch_limit is not None
    assert disturbed.micro_batch_limit < too_large
    engine.close()
    objective = NextTokenPrediction(ModelRecipe(preset))
    twin = Engine(objective, OptimizerRecipe(), EngineRecipe(1, "auto"), torch.device("cuda", 0), replace(state))
    limit = disturbed.micro_batch_limit
    sizes = [min(limit, too_large - start) for start in range(0, too_large, limit)]
    expected = twin.step(batch, sizes, 1.0)
    assert disturbed.loss == pytest.approx(expected.loss, rel=1e-5)
    assert disturbed.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    assert 0 < expected.compute_seconds < 600
    twin.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_engine_gives_its_memory_back(stage):
    free = torch.cuda.memory_allocated()
    engine = build("Doge-160M", stage)
    engine.step(share(1), [1], 1.0)
    engine.close()
    assert torch.cuda.memory_allocated() < free + 64 * 2**20
