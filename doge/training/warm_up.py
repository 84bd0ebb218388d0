"""Slow first-time work of a training process, done before anyone waits for it."""

import torch

from doge.model.configuration import ModelRecipe
from doge.training import process_group
from doge.training.communicator import Communicator
from doge.training.deepspeed_internals import import_deepspeed
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch
from doge.training.optimizer import OptimizerRecipe

_SMALL = ModelRecipe(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=64, keep_window_size=64,
)  # fmt: skip


def warm_up(optimizer: OptimizerRecipe, recipe: EngineRecipe, device: torch.device) -> None:
    """Import DeepSpeed and, on a CPU, make a step of a very small model, alone in a process group.

    DeepSpeed and torch import much of themselves only when an engine is built or steps. A GPU is left untouched: a
    process that waits may not know yet which one it will have, and would take memory from the one that trains there.
    """
    import_deepspeed(device)
    if device.type != "cpu":
        return
    process_group.be_alone(device)
    try:
        replicas = None if recipe.states == "partitioned" else Communicator(0, 1)
        engine = Engine(NextTokenPrediction(_SMALL), optimizer, recipe, device, replicas=replicas)
        tokens = torch.arange(64)[None]
        engine.step(TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": tokens}), [1], 1.0)
        engine.state()
        engine.close()
    finally:
        process_group.leave()
