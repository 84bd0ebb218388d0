"""torch.compile of the layers changes no figure of a training step, with packed documents and uneven micro-batches."""

import pytest
import torch

from doge.model.configuration import ModelRecipe
from doge.training import process_group
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe

LENGTH, VOCABULARY = 48, 64
MODEL = ModelRecipe(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH, keep_window_size=20,
)  # fmt: skip


@pytest.fixture
def group():
    process_group.leave()  # what a test before may have left of DeepSpeed's
    torch._dynamo.reset()  # and its graphs, which would serve here too
    process_group.be_alone(torch.device("cpu"))
    yield
    process_group.leave()


def batch_of(step: int) -> TensorBatch:
    """Five rows, each packed of two documents."""
    tokens = torch.randint(0, VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(LENGTH).expand(5, -1) % 30
    labels = tokens.masked_fill(positions == 0, -100)
    return TensorBatch({"input_ids": tokens, "labels": labels, "position_ids": positions})


@pytest.mark.slow
def test_a_compiled_engine_makes_the_same_steps(group):
    results = []
    for compile in ("off", "on"):
        recipe = EngineRecipe(1, "fp32", compile)
        engine = Engine(NextTokenPrediction(MODEL), OptimizerRecipe(lr=5e-3), recipe, torch.device("cpu"))
        assert engine.compiled == (compile == "on")
        before = engine.progress
        results.append([engine.step(batch_of(step), [3, 2], 1.0) for step in range(2)])
        passes = 2 * 2
        assert (engine.progress - before > passes) == engine.compiled  # forward and backward are begun and ended
        names = list(engine.state().parameters)
        engine.close()
    assert not [name for name in names if "_orig_mod" in name]
    for plain, compiled in zip(*results, strict=True):
        assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
        assert compiled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
