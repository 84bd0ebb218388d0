"""What follows a warm-up in its process is what the process would have done without it."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from new_processes import NEW

from doge.model.configuration import ModelRecipe
from doge.training import process_group
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe
from doge.training.warm_up import warm_up

CPU = torch.device("cpu")
MODEL = ModelRecipe(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
STAGES = (1, 3)
SLOW_IMPORTS = ("mlflow", "torch._inductor.compile_fx")  # which take a host a second or two


def losses(recipe: EngineRecipe) -> list[float]:
    process_group.be_alone(CPU)
    engine = Engine(NextTokenPrediction(MODEL, seed=1), OptimizerRecipe(), recipe, CPU)
    tokens = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(32).expand(2, -1)
    batch = TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": positions})
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed would take another GPU than the one that a process sees"
    made = [engine.step(batch, [2], 1.0).loss for _ in range(3)]
    engine.close()
    process_group.leave()
    return made


def before_and_after(results) -> None:
    torch.set_num_threads(1)
    for stage in STAGES:
        recipe = EngineRecipe(zero_stage=stage, precision="fp32")
        before = losses(recipe)
        warm_up(OptimizerRecipe(), recipe, CPU)
        results.put(
            (before, dist.is_initialized(), losses(recipe), [name for name in SLOW_IMPORTS if name in sys.modules])
        )


@pytest.mark.slow
def test_a_warm_up_changes_no_loss_and_leaves_no_group():
    results = NEW.Queue()
    process = NEW.Process(target=before_and_after, args=(results,))
    process.start()
    for _ in STAGES:
        before, in_group, after, imported = results.get(timeout=120)
        assert not in_group
        assert not imported, "DeepSpeed imported what is not used"
        assert before == after
        assert before[-1] < before[0]
    process.join()
