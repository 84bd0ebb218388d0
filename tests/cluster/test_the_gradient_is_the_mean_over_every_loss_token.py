"""Promises 2 and 3 on real process groups: uneven shares give the single-process step, and state moves between all."""

import os

import pytest
import torch
import torch.multiprocessing as multiprocessing

from doge.configuration import ModelRecipe
from doge.engine import Engine, EngineRecipe, TrainState
from doge.modeling import build_model
from doge.optimizer import OptimizerRecipe

STEPS, BATCH, LENGTH, VOCABULARY = 6, 8, 16, 64
OPTIMIZER = OptimizerRecipe(lr=5e-3, max_grad_norm=0.5)
MODEL = ModelRecipe(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=LENGTH, keep_window_size=LENGTH,
)  # fmt: skip
# Uneven in sequences and, with the labels below, more so in tokens.
SHARES = {1: [(0, 8)], 2: [(0, 3), (3, 8)], 3: [(0, 1), (1, 6), (6, 8)]}


def model():
    torch.manual_seed(0)
    return build_model(MODEL.build())


def global_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(BATCH):
        labels[row, : 2 * row] = -100
    return {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(LENGTH).expand(BATCH, -1)}


def lr_factor(step: int) -> float:
    return min(1.0, (step + 1) / 3)


def micro_batches(step: int, rank: int, world_size: int, equal: bool):
    """Uneven numbers of micro-batches, or three for every rank, some of them a row that teaches nothing."""
    start, stop = SHARES[world_size][rank]
    pieces = torch.tensor_split(torch.arange(start, stop), 3) if equal else torch.arange(start, stop).split(2)
    for piece in pieces:
        if len(piece):
            yield {key: value[piece] for key, value in global_batch(step).items()}
        else:
            row = {key: value[:1] for key, value in global_batch(step).items()}
            yield row | {"labels": torch.full((1, LENGTH), -100)}


def plain_run() -> list[tuple[float, float]]:
    """Loss and gradient norm of every step without DeepSpeed, in one process, whole batches."""
    network, results = model(), []
    optimizer = OPTIMIZER.build(network)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * lr_factor(step)
        loss = network(**global_batch(step), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


def steps(engine: Engine, first: int, world_size: int, rank: int, equal: bool) -> list[tuple[float, float]]:
    results = []
    for step in range(first, STEPS):
        result = engine.step(micro_batches(step, rank, world_size, equal), lr_factor(step))
        results.append((result.loss, result.grad_norm))
    return results


def run_group(rank: int, world_size: int, folder: str, runs: list[tuple[str, int, str, str | None]]) -> None:
    """One rank: for each (name, stage, precision, state to go on from) train, saving results and the middle state."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.FileStore(f"{folder}/store-{world_size}-{runs[0][0]}", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for name, stage, precision, start in runs:
        recipe = EngineRecipe(zero_stage=stage, precision=precision)
        state = TrainState(**torch.load(f"{folder}/{start}.state")) if start else None
        engine = Engine(model(), OPTIMIZER, recipe, torch.device("cpu"), state)
        results, middle = [], None
        if state is None:
            for step in range(STEPS // 2):
                result = engine.step(micro_batches(step, rank, world_size, stage >= 2), lr_factor(step))
                results.append((result.loss, result.grad_norm))
            middle = engine.state()
        results += steps(engine, engine.step_count, world_size, rank, stage >= 2)
        loss, tokens = engine.evaluate(micro_batches(99, rank, world_size, equal=True))
        if rank == 0:
            torch.save({"steps": results, "evaluation": (loss, tokens)}, f"{folder}/{name}.results")
            if middle is not None:
                torch.save(vars(middle), f"{folder}/{name}.state")
    torch.distributed.destroy_process_group()


FRESH = [(f"zero{stage}-{precision}", stage, precision, None)
         for stage in range(4) for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")]  # fmt: skip
MOVES = [("zero2-fp32", 1), ("zero1-fp32", 3), ("zero3-fp32", 0), ("zero0-fp32", 2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Results by group size and name; every group of processes is started once."""
    found = {}
    folders = {world_size: tmp_path_factory.mktemp(f"group{world_size}") for world_size in (2, 3)}
    for world_size in (2, 3):
        folder = folders[world_size]
        runs = FRESH if world_size == 2 else [run for run in FRESH if run[2] == "fp32"]
        # Each state of the middle goes on in its own group and, from two workers, at another stage with three.
        runs = runs + [(f"{name}-again", stage, precision, name) for name, stage, precision, _ in runs]
        if world_size == 3:
            for name, stage in MOVES:
                os.link(folders[2] / f"{name}.state", folder / f"two-{name}.state")
                runs.append((f"two-{name}-to-{stage}", stage, "fp32", f"two-{name}"))
        multiprocessing.spawn(run_group, (world_size, str(folder), runs), nprocs=world_size)
        for path in folder.glob("*.results"):
            found[f"{world_size} {path.stem}"] = torch.load(path)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_uneven_shares_give_the_single_process_steps(results, world_size, stage):
    for found, expected in zip(results[f"{world_size} zero{stage}-fp32"]["steps"], plain_run(), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_closely_with_fp32_master_weights(results, stage):
    for found, expected in zip(results[f"2 zero{stage}-bf16"]["steps"], plain_run(), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=2e-3)
        assert found[1] == pytest.approx(expected[1], rel=5e-2)


def test_going_on_from_a_state_repeats_to_the_last_digit(results):
    again = [name for name in results if name.endswith("-again")]
    assert len(again) == 11
    for name in again:
        assert results[name]["steps"] == results[name.removesuffix("-again")]["steps"][STEPS // 2 :], name


@pytest.mark.parametrize(("name", "stage"), MOVES)
def test_a_state_goes_on_at_another_size_and_stage(results, name, stage):
    moved = results[f"3 two-{name}-to-{stage}"]["steps"]
    for found, expected in zip(moved, plain_run()[STEPS // 2 :], strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


def test_the_held_out_loss_counts_every_token_once(results):
    losses = {name: result["evaluation"] for name, result in results.items() if "fp32" in name}
    labels = global_batch(99)["labels"]
    assert {tokens for _, tokens in losses.values()} == {int((labels[:, 1:] != -100).sum())}
    values = [loss for loss, _ in losses.values()]
    assert max(values) - min(values) < 1e-4
