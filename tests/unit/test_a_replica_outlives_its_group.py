"""Ranks that hold the whole state, as threads of one process: a group that breaks costs them no step."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf

import pytest
import torch

from doge.common.network import free_address
from doge.model.configuration import ModelRecipe
from doge.training import process_group
from doge.training.communicator import CommunicationError, Communicator
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import LossSum, TensorBatch
from doge.training.optimizer import OptimizerRecipe
from doge.training.step_result import StepRefused

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MODEL = ModelRecipe(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=16, keep_window_size=16,
)  # fmt: skip
PRECISIONS = ("fp32", "bf16")


class Fragile(NextTokenPrediction):
    """Its loss is no number where a batch begins with token 63."""

    def loss_sum(self, model, batch):
        found = super().loss_sum(model, batch)
        broken = bool((batch.tensors["input_ids"][:, 0] == 63).any())
        return LossSum(found.loss * float("nan")) if broken else found


def batch(step: int, broken: bool = False) -> TensorBatch:
    tokens = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(step))
    if broken:
        tokens[0, 0] = 63
    return TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(16).expand(4, -1)})


@pytest.fixture(params=PRECISIONS)
def engine(request):
    """Makes engines, each with the whole state."""
    torch.set_num_threads(1)
    process_group.be_alone(CPU)
    made = []

    def make() -> Engine:
        recipe = EngineRecipe(precision=request.param)
        made.append(Engine(Fragile(MODEL), OptimizerRecipe(lr=1e-2), recipe, CPU, replicas=Communicator(0, 1)))
        return made[-1]

    yield make
    for each in made:
        each.close()
    process_group.leave()


@contextmanager
def group(*engines: Engine):
    """Lets the engines step together; yields a function of a step's number that gives their losses or errors."""
    address = free_address("127.0.0.1")
    with ThreadPoolExecutor(len(engines)) as pool:

        def join(rank: int) -> None:
            engines[rank].join(Communicator(rank, len(engines), address))

        def step(number: int, silent: int | None = None, broken: bool = False, max_loss: float = inf) -> list:
            def one(rank: int):
                own = batch(number, broken)[2 * rank : 2 * rank + 2] if len(engines) > 1 else batch(number, broken)
                if rank == silent:
                    return None
                try:
                    return engines[rank].step(own, [1] * len(own), 1.0, max_loss=max_loss).loss
                except (CommunicationError, StepRefused) as error:
                    return error

            return list(pool.map(one, range(len(engines))))

        list(pool.map(join, range(len(engines))))
        groups = [each.replicas for each in engines]
        yield step
        for each in groups:
            each.close()


def weights(engine: Engine) -> list[torch.Tensor]:
    state = engine.state()
    return [*state.parameters.values(), *state.moments["exp_avg"].values()]


def test_survivors_and_a_newcomer_go_on_from_the_step_that_was_under_way(engine):
    undisturbed = engine()
    with group(undisturbed) as step:
        wanted = [step(number)[0] for number in range(6)]
    survivor, victim = engine(), engine()
    with group(survivor, victim) as step:
        found = [step(number) for number in range(3)]
        threading.Timer(0.2, victim.replicas.close).start()
        (error, _) = step(3, silent=1)
    assert isinstance(error, CommunicationError)
    assert survivor.whole
    assert survivor.step_count == 3
    before = weights(survivor)
    survivor.leave()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(survivor), strict=True))
    newcomer = engine()
    newcomer.load(survivor.state())
    with group(newcomer, survivor) as step:
        found += [step(number) for number in range(3, 6)]
    for each, want in zip(found, wanted, strict=True):
        assert each[0] == each[1] == pytest.approx(want, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(weights(newcomer), weights(survivor), strict=True))


def test_a_rank_that_waits_for_a_silent_one_is_woken_with_its_state_whole(engine):
    waiting, silent = engine(), engine()
    with group(waiting, silent) as step:
        step(0)

        def wake() -> None:
            while not waiting.waiting:
                time.sleep(0.01)
            waiting.abandon()
            waiting.replicas.abort()

        thread = threading.Thread(target=wake)
        thread.start()
        error, _ = step(1, silent=1)
        thread.join()
    assert isinstance(error, CommunicationError)
    waiting.leave()
    assert (waiting.whole, waiting.step_count, waiting.waiting) == (True, 1, False)
    assert waiting.step(batch(1), [4], 1.0).loss > 0


@pytest.mark.parametrize("misfortune", [{"broken": True}, {"max_loss": 0.1}], ids=["no number", "spike"])
def test_a_loss_that_is_no_number_or_a_spike_updates_nothing_on_any_rank(engine, misfortune):
    engines = engine(), engine()
    with group(*engines) as step:
        step(0)
        before = [weights(each) for each in engines]
        errors = step(1, **misfortune)
        assert all(isinstance(error, StepRefused) and error.is_spike == ("max_loss" in misfortune) for error in errors)
        for old, each in zip(before, engines, strict=True):
            assert each.step_count == 1
            assert all(torch.equal(a, b) for a, b in zip(old, weights(each), strict=True))
        first, second = step(1)
    assert first == second > 0


def test_after_a_skipped_step_a_newcomer_makes_the_same_updates(engine):
    old, newcomer = engine(), engine()
    old.step(batch(0), [4], 1.0)
    old.skip()
    newcomer.load(old.state())
    with group(old, newcomer) as step:
        for number in (2, 3):
            step(number)
    assert old.step_count == newcomer.step_count == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(old), weights(newcomer), strict=True))


def test_every_pass_and_every_exchange_is_progress(engine):
    engines = engine(), engine()
    with group(*engines) as step:
        before = engines[0].progress
        step(0)
        assert engines[0].progress >= before + 2 + 3


def test_replicas_whose_norms_round_differently_clip_by_one_factor(engine, monkeypatch):
    """Unequal devices add up in unequal orders; the weights of their replicas stay equal all the same."""
    engines, own = (engine(), engine()), torch.nn.utils.get_total_norm

    def rounded(tensors: list[torch.Tensor]) -> torch.Tensor:
        return own(tensors) * (1.5 if threading.current_thread().name.endswith("_1") else 1.0)

    with group(*engines) as step:
        step(0)
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", rounded)
        for number in range(1, 4):
            step(number)
    assert all(torch.equal(a, b) for a, b in zip(weights(engines[0]), weights(engines[1]), strict=True))
