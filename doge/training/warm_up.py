"""What a process is slow at the first time, done before anybody waits for it."""

import torch

from doge.model.configuration import ModelRecipe
from doge.model.modeling import build_model
from doge.training import process_group
from doge.training.engine import Engine, EngineRecipe, import_deepspeed
from doge.training.optimizer import OptimizerRecipe

_SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "keep_window_size": 64,
}  # fmt: skip


def warm_up(model: ModelRecipe, optimizer: OptimizerRecipe, recipe: EngineRecipe, device: torch.device) -> None:
    """Import DeepSpeed and, on a CPU, make a step of a very small model of the kind, alone in a process group.

    DeepSpeed and torch import much of themselves only when an engine is built or steps. A GPU is left untouched: a
    process that waits may not know yet which one it will have, and would take memory from the one that trains there.
    """
    import_deepspeed(device)
    if device.type != "cpu":
        return
    small = ModelRecipe(preset=model.preset, **_SMALL)
    process_group.join(0, 1, 0, process_group.free_address("127.0.0.1"), device)
    try:
        engine = Engine(build_model(small.build()), optimizer, recipe, device)
        tokens = torch.arange(64)[None]
        engine.step({"input_ids": tokens, "labels": tokens, "position_ids": tokens}, [1], 1.0)
        engine.state()
        engine.close()
    finally:
        process_group.leave()
