"""Muon and AdamW as one optimizer: torch's own updates, whether the matrices are apart or laid end to end."""

from dataclasses import replace

import pytest
import torch

from doge.common.errors import UserError
from doge.model.configuration import ModelRecipe
from doge.model.modeling import build_model
from doge.training import process_group
from doge.training.communicator import Communicator
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.muon import MuonAdamW, check_whole
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe, hidden_matrices
from doge.training.state.train_state import TrainState

MODEL = ModelRecipe(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
RECIPE = OptimizerRecipe(lr=3e-3, hidden_matrices="muon", muon_lr=2e-2, max_grad_norm=1e9)
KINDS = replace(RECIPE, embedding_lr=2e-2, vector_lr=1e-3, embedding_weight_decay=0.0, base_width=16)
CPU = torch.device("cpu")


@pytest.fixture
def group():
    process_group.leave()  # what a test before may have left of DeepSpeed's
    process_group.be_alone(CPU)
    yield
    process_group.leave()


def batch(step: int) -> TensorBatch:
    tokens = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(step))
    return TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(24).expand(4, -1)})


def model():
    torch.manual_seed(1)
    return build_model(MODEL.build())


def test_the_matrices_between_embedding_and_output_are_chosen():
    network = model()
    chosen = {id(parameter) for parameter in hidden_matrices(network)}
    names = [name for name, parameter in network.named_parameters() if id(parameter) in chosen]
    assert {name.rsplit(".", 2)[-2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(names) == 7 * 2


def test_it_makes_the_updates_of_torchs_own_two_optimizers():
    ours, theirs = model(), model()
    optimizer = RECIPE.build(ours)
    matrices = hidden_matrices(theirs)
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in theirs.parameters() if id(parameter) not in chosen]
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=RECIPE.weight_decay)
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.ndim >= 2]}, {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0}],
        lr=3e-3, betas=RECIPE.betas, eps=RECIPE.eps, weight_decay=RECIPE.weight_decay, fused=True,
    )  # fmt: skip
    for step in range(4):
        for network in (ours, theirs):
            network.zero_grad()
            network(**batch(step).tensors, use_cache=False).loss.backward()
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, msg=name)


def test_matrices_that_lie_end_to_end_are_updated_alike():
    torch.manual_seed(0)
    apart = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 24), (32, 16))]
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in apart] + [torch.zeros(5)]))  # with padding
    other = torch.nn.Parameter(torch.zeros(3))
    optimizers = []
    for parameters in (apart, apart):
        group = {"params": list(parameters), "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
        optimizers.append(MuonAdamW(group, torch.optim.AdamW([other])))
    optimizers[1].param_groups[0]["params"] = [flat]  # as DeepSpeed does
    for _ in range(3):
        for parameter in apart:
            parameter.grad = torch.randn_like(parameter)
        flat.grad = torch.cat([p.grad.flatten() for p in apart] + [torch.zeros(5)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(flat[:-5], torch.cat([p.detach().flatten() for p in apart]))
    assert torch.equal(flat[-5:], torch.zeros(5))


@pytest.mark.parametrize("recipe", [RECIPE, KINDS], ids=["two rates", "a rate for each kind"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_from_its_state_as_if_never_interrupted(precision, recipe, group):
    def steps(engine, numbers):
        return [engine.step(batch(step), [2, 2], 1.0).loss for step in numbers]

    def engine(state=None):
        objective = NextTokenPrediction(MODEL, seed=1)
        return Engine(objective, recipe, EngineRecipe(1, precision), CPU, state, Communicator(0, 1))

    whole, part = engine(), engine()
    expected = steps(whole, range(6))
    assert steps(part, range(3)) == expected[:3]
    state = part.state()
    assert state.moments["exp_avg"]["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0
    assert steps(engine(TrainState(state.step, state.parameters, state.moments)), range(3, 6)) == expected[3:]


def test_parts_of_matrices_are_refused_in_a_sentence():
    optimizer = RECIPE.build(model())
    check_whole(optimizer, 1, 1)
    check_whole(optimizer, 0, 2)
    check_whole(OptimizerRecipe().build(model()), 3, 8)
    with pytest.raises(UserError, match=r"needs whole matrices .* ZeRO-2 .* 4 workers .* --engine.states replicated"):
        check_whole(optimizer, 2, 4)


def test_a_plan_says_what_updates_what():
    assert OptimizerRecipe().describe() == "AdamW, peak learning rate 0.008"
    assert "Muon for hidden matrices, peak learning rate 0.02" in RECIPE.describe()
