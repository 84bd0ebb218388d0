"""Promises 2 and 3 on real process groups: uneven shares give the single-process step, and state moves between all."""

import gc
import os
from itertools import accumulate

import pytest
import torch
from new_processes import run_in_new_processes

from doge.common.network import free_address
from doge.model.configuration import ModelRecipe
from doge.model.modeling import build_model
from doge.training.communicator import Communicator
from doge.training.deepspeed_internals import import_deepspeed
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe
from doge.training.process_group import be_alone, leave
from doge.training.state.train_state import TrainState

pytestmark = pytest.mark.slow

MIDDLE, STEPS, BATCH, LENGTH, VOCABULARY = 2, 6, 8, 16, 64
OPTIMIZER = OptimizerRecipe(
    lr=5e-3, embedding_lr=8e-3, vector_lr=4e-3, base_width=24, embedding_weight_decay=0.0, max_grad_norm=0.5
)
Z_LOSS = 1e-3
MODEL = ModelRecipe(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=LENGTH, keep_window_size=LENGTH,
)  # fmt: skip
REPLICAS = 4  # in place of a ZeRO stage: every rank holds the whole state
STAGES = (*range(4), REPLICAS)
# Uneven in sequences and, with the labels below, more so in tokens; one rank has nothing.
SHARES = {1: [(0, 8)], 2: [(0, 3), (3, 8)], 3: [(0, 1), (1, 8), (8, 8)]}


def model():
    """The same on every rank, and away from its start, where some gradients are zero."""
    torch.manual_seed(0)
    network = build_model(MODEL.build())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return network


class AwayFromStart(NextTokenPrediction):
    def build(self):
        return model()


OBJECTIVE = AwayFromStart(MODEL, z_loss=Z_LOSS)


def global_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(BATCH):
        labels[row, : 2 * row] = -100
    return {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(LENGTH).expand(BATCH, -1)}


def lr_factor(step: int) -> float:
    return min(1.0, (step + 1) / 3)


def share(step: int, rank: int, world_size: int, equal: bool) -> tuple[TensorBatch, list[int]]:
    """A rank's rows and their cut: uneven numbers of micro-batches, or three for every rank, some of them empty."""
    start, stop = SHARES[world_size][rank]
    rows = torch.arange(start, stop)
    pieces = torch.tensor_split(rows, 3) if equal else rows.split(2) if len(rows) else ()
    return TensorBatch(global_batch(step))[start:stop], [len(piece) for piece in pieces]


def plain_run() -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step without DeepSpeed, in one process, whole batches; the first gradient."""
    network, results = model(), []
    optimizer = OPTIMIZER.build(network)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step)
        loss = network(**global_batch(step), use_cache=False, z_loss=Z_LOSS).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.max_grad_norm)
        if step == 0:
            gradient = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results, gradient


def run_groups(rank: int, folder: str, groups: list[tuple[int, list[tuple[str, int, str, str | None]]]], ports) -> None:
    """One process, in each group in turn that is large enough to have it: (workers, what to run there)."""
    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    gc.freeze()  # an engine that is closed collects garbage, which need not be looked for in the modules
    for world_size, runs in groups:
        if rank < world_size:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            store = torch.distributed.FileStore(f"{folder}/store-{world_size}", world_size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            for run in runs:
                if run[1] != REPLICAS:
                    run_steps(rank, world_size, folder, *run)
            leave()
            be_alone(torch.device("cpu"))
            for run in runs:
                if run[1] == REPLICAS:
                    replicas = Communicator(rank, world_size, ("127.0.0.1", ports.pop(0)))
                    run_steps(rank, world_size, folder, *run, replicas=replicas)
                    replicas.close()
            leave()
        else:
            del ports[: sum(run[1] == REPLICAS for run in runs)]


def run_steps(
    rank: int, world_size: int, folder: str, name: str, stage: int, precision: str, start: str | None, replicas=None
) -> None:
    """Train, from a state if one is named, and save results and the middle state."""
    state = TrainState(**torch.load(f"{folder}/{start}.state")) if start else None
    recipe = EngineRecipe(1 if replicas else stage, precision)
    engine = Engine(OBJECTIVE, OPTIMIZER, recipe, torch.device("cpu"), state, replicas)
    assert (engine.rank, engine.world_size) == (rank, world_size)
    results, states = [], {}
    for step in range(engine.step_count, STEPS):
        equal = engine.equal_micro_batches
        result = engine.step(*share(step, rank, world_size, equal), lr_factor(step), gather=[rank, step + 0.5])
        assert result.gathered == [[other, step + 0.5] for other in range(world_size)]
        assert result.micro_batch_limit is None
        results.append((result.loss, result.grad_norm))
        if state is None and engine.step_count in (1, MIDDLE):
            states[engine.step_count] = engine.state()
    batch, sizes = share(99, rank, world_size, equal=True)
    ends = list(accumulate(sizes))
    loss, tokens = engine.evaluate(batch[end - size : end] for size, end in zip(sizes, ends, strict=True))
    engine.close()
    if rank == 0:
        found = {"steps": results, "evaluation": (loss, tokens)}
        if state is None:  # the first moment of the first step is the gradient, as it was clipped
            moments = states[1].moments["exp_avg"].items()
            found["gradient"] = {key: value / (1 - OPTIMIZER.betas[0]) for key, value in moments}
            torch.save(vars(states[MIDDLE]), f"{folder}/{world_size}-{name}.state")
        torch.save(found, f"{folder}/{world_size}-{name}.results")


FRESH = [(f"zero{stage}-{precision}", stage, precision, None)
         for stage in STAGES for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")]  # fmt: skip
# (workers, stage) to (workers, stage); groups run in the order of ``ORDER``, so that each state is there in time.
ORDER = (1, 3, 2)
MOVES = [
    ((1, 2), (3, 0)), ((1, 3), (3, 1)), ((1, 0), (3, 2)), ((1, 1), (3, 3)),
    ((3, 2), (2, 0)), ((3, 3), (2, 1)), ((3, 1), (2, 3)), ((3, 0), (2, 2)), ((1, 1), (2, 1)),
    ((1, 2), (3, REPLICAS)), ((3, REPLICAS), (2, REPLICAS)), ((3, REPLICAS), (2, 1)),
]  # fmt: skip


def move_name(source: tuple[int, int], target: tuple[int, int]) -> str:
    return f"from-{source[0]}-zero{source[1]}-to-zero{target[1]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Results by group size and name. The same three processes form every group, one after the other."""
    folder, groups = tmp_path_factory.mktemp("groups"), []
    for world_size in ORDER:
        runs = [run for run in FRESH if world_size == 2 or run[2] == "fp32"]
        if world_size == 2:
            runs += [(f"{name}-again", stage, precision, f"2-{name}") for name, stage, precision, _ in runs]
        for source, target in MOVES:
            if target[0] == world_size:
                runs.append((move_name(source, target), target[1], "fp32", f"{source[0]}-zero{source[1]}-fp32"))
        groups.append((world_size, runs))
    ports = [free_address("127.0.0.1")[1] for _, runs in groups for run in runs if run[1] == REPLICAS]
    run_in_new_processes(run_groups, (str(folder), groups, ports), max(ORDER))
    return {path.stem: torch.load(path) for path in folder.glob("*.results")}


@pytest.fixture(scope="module")
def expected():
    return plain_run()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_of_uneven_shares_is_that_of_a_single_process(results, expected, world_size, stage):
    found = results[f"{world_size}-zero{stage}-fp32"]["gradient"]
    assert found.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-6), name
        assert gradient.abs().max() > 1e-4, f"the gradient of {name} is too small to tell anything"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_uneven_shares_give_the_single_process_steps(results, expected, world_size, stage):
    for found, wanted in zip(results[f"{world_size}-zero{stage}-fp32"]["steps"], expected[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3, REPLICAS])
def test_bf16_follows_closely_with_fp32_master_weights(results, expected, stage):
    for found, wanted in zip(results[f"2-zero{stage}-bf16"]["steps"], expected[0], strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=2e-3)
        assert found[1] == pytest.approx(wanted[1], rel=5e-2)


def test_going_on_from_a_state_repeats_to_the_last_digit(results):
    again = [name for name in results if name.endswith("-again")]
    assert len(again) == len(FRESH)
    for name in again:
        assert results[name]["steps"] == results[name.removesuffix("-again")]["steps"][MIDDLE:], name


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_losses_go_on_alike_at_another_size_and_stage(results, source, target):
    stayed = results[f"{source[0]}-zero{source[1]}-fp32"]["steps"][MIDDLE:]
    moved = results[f"{target[0]}-{move_name(source, target)}"]["steps"]
    assert len(moved) == STEPS - MIDDLE
    for found, wanted in zip(moved, stayed, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_the_held_out_loss_counts_every_token_once(results):
    losses = {name: result["evaluation"] for name, result in results.items() if "bf16" not in name}
    labels = global_batch(99)["labels"]
    assert {tokens for _, tokens in losses.values()} == {int((labels[:, 1:] != -100).sum())}
    values = [loss for loss, _ in losses.values()]
    assert max(values) - min(values) < 2e-4
