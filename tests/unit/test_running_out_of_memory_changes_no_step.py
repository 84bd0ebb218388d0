"""A rank that runs out of memory in a step repeats its part with smaller micro-batches, and the step is the same."""

import gc
import os

import pytest
import torch
from new_processes import run_in_new_processes

from doge.common.errors import UserError
from doge.model.configuration import ModelRecipe
from doge.training.deepspeed_internals import import_deepspeed
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.memory import OutOfMemory
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe

pytestmark = pytest.mark.slow

STEPS, LENGTH, VOCABULARY, DISTURBED = 4, 16, 64, 1
OPTIMIZER = OptimizerRecipe(lr=5e-3, max_grad_norm=0.5)
MODEL = ModelRecipe(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=LENGTH, keep_window_size=LENGTH,
)  # fmt: skip
SHARES = [(0, 7), (7, 10)]
SIZES = [[3, 4], [2, 1]]
SMALLER = [[2, 2, 2, 1], [2, 1]]  # what rank 0 makes of its share when four do not fit
STAGES = [(0, "fp32"), (1, "fp32"), (1, "bf16")]
PLACES = ["forward", "backward", "end of backward"]


def share(step: int, rank: int) -> TensorBatch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (10, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(10):
        labels[row, :row] = -100
    batch = {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(LENGTH).expand(10, -1)}
    return TensorBatch(batch)[slice(*SHARES[rank])]


class RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory (as the test wants it).")


def refuse(network: torch.nn.Module, place: str, limit: int):
    """Let micro-batches of more than ``limit`` sequences run out of memory; returns what ends it."""
    if place == "forward":

        def before(module, inputs):
            if len(inputs[0]) > limit:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")

        return network.model.layers[1].register_forward_pre_hook(before)
    # In the first layer's backward, when the second has its gradients; or when only the embedding's is missing.
    module = network.model.layers[0] if place == "backward" else network.model.embed_tokens
    return module.register_forward_hook(
        lambda module, inputs, output: RefuseBackward.apply(output) if len(output) > limit else output
    )


def train(rank: int, stage: int, precision: str, place: str | None = None, sizes=SIZES) -> dict:
    """A few steps, in the one of which rank 0 is refused memory in ``place``."""
    engine = Engine(NextTokenPrediction(MODEL), OPTIMIZER, EngineRecipe(stage, precision), torch.device("cpu"))
    results, states = [], []
    for step in range(STEPS):
        disturbed = step == DISTURBED
        handle = refuse(engine.module, place, 3) if place and disturbed and rank == 0 else None
        result = engine.step(share(step, rank), (sizes if disturbed else SIZES)[rank], 1.0)
        if handle:
            handle.remove()
        assert result.micro_batch_limit == (2 if handle else None)
        assert result.compute_seconds > 0
        assert result.wait_seconds >= 0
        results.append((result.loss, result.grad_norm))
        states.append(engine.state())
    if rank > 0:
        return {}
    return {
        "steps": results,
        "moments": states[DISTURBED].moments["exp_avg"],  # the gradient is in them
        "parameters": states[-1].parameters,
    }


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    import_deepspeed(torch.device("cpu"))
    gc.freeze()  # running out of memory collects garbage, which need not be looked for in the modules
    found = {}
    for stage, precision in STAGES:
        found[stage, precision, "undisturbed"] = train(rank, stage, precision)
        found[stage, precision, "smaller"] = train(rank, stage, precision, sizes=SMALLER)
        for place in PLACES:
            found[stage, precision, place] = train(rank, stage, precision, place)
    if rank == 0:
        torch.save(found, f"{folder}/results")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    run_in_new_processes(run, (str(folder),), 2)
    return torch.load(folder / "results")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_repeated_step_is_to_the_last_digit_one_that_began_with_small_micro_batches(results, stage, precision, place):
    found, expected = results[stage, precision, place], results[stage, precision, "smaller"]
    assert found["steps"] == expected["steps"]
    for part in ("moments", "parameters"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", [0, 1])
def test_a_repeated_step_is_the_undisturbed_one(results, stage, place):
    found, expected = results[stage, "fp32", place], results[stage, "fp32", "undisturbed"]
    for step, wanted in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(wanted, abs=1e-6)
    for name, value in expected["moments"].items():
        assert torch.allclose(found["moments"][name], value, rtol=0, atol=1e-7), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Engines in a group of this process alone, with nine rows for a step."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def build(stage: int, precision: str = "fp32") -> Engine:
        recipe = EngineRecipe(stage, precision)
        return Engine(NextTokenPrediction(MODEL), OPTIMIZER, recipe, torch.device("cpu"))

    import_deepspeed(torch.device("cpu"))
    gc.freeze()
    yield build
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", [2, 3])
def test_where_micro_batches_communicate_the_caller_is_told_the_limit(alone, stage):
    engine = alone(stage)
    refuse(engine.module, "forward", 3)
    with pytest.raises(OutOfMemory) as error:
        engine.step(share(0, 0), [1, 6], 1.0)
    assert error.value.limit == 3


def test_the_limit_is_halved_until_it_fits(alone):
    engine = alone(1)
    refuse(engine.module, "backward", 1)
    assert engine.step(share(0, 0), [7], 1.0).micro_batch_limit == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_sequence_too_many_is_a_sentence(alone, stage):
    engine = alone(stage)
    refuse(engine.module, "forward", 0)
    with pytest.raises(UserError, match="gradient-checkpointing"):
        engine.step(share(0, 0), [7] if stage < 2 else [1] * 7, 1.0)


def test_the_optimizer_out_of_memory_is_the_callers_matter(alone, monkeypatch):
    engine = alone(1)

    def refused():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine._engine, "step", refused)
    with pytest.raises(OutOfMemory) as error:
        engine.step(share(0, 0), [4, 3], 1.0)
    assert error.value.limit == 2


def test_other_errors_are_no_matter_of_memory(alone):
    engine = alone(0)
    engine.module.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step(share(0, 0), [7], 1.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_abandoned_step_ends_after_its_micro_batch(alone, stage):
    engine, passes = alone(stage), []

    def abandon(*_) -> None:
        passes.append(1)
        engine.abandon()

    engine.module.register_forward_pre_hook(abandon)
    with pytest.raises(RuntimeError, match="abandoned"):
        engine.step(share(0, 0), [1] * 7, 1.0)
    with pytest.raises(RuntimeError, match="abandoned"):
        engine.evaluate([share(0, 0)])
    assert len(passes) == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("limit", [2, 99])
def test_a_rehearsal_changes_nothing(alone, stage, limit):
    engine, twin = alone(stage), alone(stage)
    for one in (engine, twin):
        one.step(share(0, 0), [4, 3], 1.0)
    random = torch.random.get_rng_state()
    if limit < 4 and stage < 2:
        handle = refuse(engine.module, "backward", limit)
        with pytest.raises(torch.OutOfMemoryError):
            engine.rehearse(4, LENGTH)
        handle.remove()
    else:
        engine.rehearse(4, LENGTH)
    assert torch.equal(torch.random.get_rng_state(), random)
    for step in (1, 2):
        state, expected = engine.state(), twin.state()
        assert state.step == expected.step == step
        for name, value in expected.parameters.items():
            assert torch.equal(state.parameters[name], value)
            for moment, values in expected.moments.items():
                assert torch.equal(state.moments[moment][name], values[name])
        results = [one.step(share(step, 0), [4, 3], 1.0) for one in (engine, twin)]
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == results[1].grad_norm


@pytest.mark.parametrize("end", ["done", "broken off", "group left"])
@pytest.mark.parametrize(("stage", "precision"), [*STAGES, (2, "bf16"), (3, "bf16")])
def test_a_closed_engine_gives_its_memory_back(alone, monkeypatch, stage, precision, end):
    before = tensors()
    engine = alone(stage, precision)
    engine.step(share(0, 0), [4, 3], 1.0)
    if end != "done":
        engine.module.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step(share(1, 0), [4, 3], 1.0)
    assert sum(tensors().values()) > sum(before.values()) + 3 * 10_000
    if end == "group left":
        monkeypatch.setattr("deepspeed.comm.comm.cdb", None)
    engine.close()
    left = {key: elements for key, elements in tensors().items() if key not in before}
    assert sum(left.values()) < 1_000


def tensors() -> dict[int, int]:
    """Elements of every tensor that is somewhere, by id."""
    gc.collect()
    return {id(thing): thing.numel() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
