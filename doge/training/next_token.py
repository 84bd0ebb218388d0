"""Pretraining's objective: predict the next token of packed sequences."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from doge.model.configuration import ModelRecipe, training_flops
from doge.model.loss import IGNORE_INDEX
from doge.model.modeling import DogeForCausalLM, build_model
from doge.training.objective import Batch, LossSum, TensorBatch


@dataclass(frozen=True)
class NextTokenPrediction:
    """Mean cross-entropy in nats over every label that counts; the unit is a packed sequence.

    Args:
        model: recipe of the model.
        seed: seed of the initial weights.
        gradient_checkpointing: trade a third more computation for activation memory.
        trainable_parameters: regular expression; parameters whose name it finds nothing in are frozen.
        z_loss: in training, adds so much times the square of each label's log-sum-exp of logits to the loss.
    """

    model: ModelRecipe
    seed: int = 0
    gradient_checkpointing: bool = False
    trainable_parameters: str = ""
    z_loss: float = 0.0

    @property
    def metrics(self) -> Sequence[str]:
        return ()

    def build(self) -> DogeForCausalLM:
        torch.manual_seed(self.seed)
        model = build_model(self.model.build())
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def trainable(self, name: str) -> bool:
        return re.search(self.trainable_parameters, name) is not None

    def prepare(self, model: torch.nn.Module, units: Any, seeds: Iterable[int]) -> TensorBatch:
        """Make packed sequences the model's inputs, each ``(sequences, sequence_length)``."""
        arrays = {"input_ids": units.tokens, "position_ids": units.position_ids, "labels": units.labels}
        return TensorBatch({name: torch.from_numpy(array) for name, array in arrays.items()})

    def weight(self, batch: Batch) -> int:
        """The labels that count: the first of a row is never predicted."""
        assert isinstance(batch, TensorBatch)
        return int((batch.tensors["labels"][:, 1:] != IGNORE_INDEX).sum())

    def flops(self, batch: Batch) -> float:
        """Those of every token and of every key that it attends to, all within its document."""
        assert isinstance(batch, TensorBatch)
        positions = batch.tensors["position_ids"]
        per_token, per_key, window = _costs(self.model)
        return per_token * positions.numel() + per_key * int((positions + 1).clamp(max=window).sum())

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        assert isinstance(batch, TensorBatch)
        z_loss = self.z_loss if model.training else 0.0  # held-out losses are of the model alone
        return LossSum(model(**batch.tensors, use_cache=False, reduction="sum", z_loss=z_loss).loss)

    def rehearsal(self, units: int, length: int) -> TensorBatch:
        tokens = torch.randint(self.model.build().vocab_size, (units, length))
        positions = torch.arange(length).expand(units, -1)
        return TensorBatch({"input_ids": tokens, "labels": tokens, "position_ids": positions})

    def empty(self) -> TensorBatch:
        row = torch.arange(2)[None]
        return TensorBatch({"input_ids": row * 0, "labels": row * 0 + IGNORE_INDEX, "position_ids": row})


@lru_cache(maxsize=8)
def _costs(model: ModelRecipe) -> tuple[float, float, int]:
    """Floating-point operations of a token and of a key that it attends to, and the most keys that it does."""
    config = model.build()
    return training_flops(config, 1, 0), training_flops(config, 0, 1), config.keep_window_size
