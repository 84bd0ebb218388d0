"""What a training minimises: the seam between the step under DeepSpeed and what is learnt by it.

A *unit* is what is numbered, shared out and counted: a sequence, a pair, a prompt with its group. A *batch* is some
units as tensors. The loss of a step is the sum over the units of the global batch, divided by their total *weight*,
such as loss tokens or pairs, so that it does not depend on who computes which units.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Batch(Protocol):
    """Units as tensors."""

    def __len__(self) -> int:
        """The number of units."""

    def __getitem__(self, part: slice, /) -> "Batch":
        """The units of a slice."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on ``device``."""


@dataclass(frozen=True)
class TensorBatch:
    """A batch whose tensors have one entry a unit along their first dimension."""

    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, part: slice, /) -> "TensorBatch":
        return TensorBatch({name: tensor[part] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> "TensorBatch":
        return TensorBatch({name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class LossSum:
    """The loss of a micro-batch.

    Args:
        loss: summed over the units, a scalar with a gradient.
        metrics: further sums, scalars without one, by the names in `Objective.metrics`; reported over the weight.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is learnt, from the model to the loss. Picklable; every rank has an equal one."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of further means over the weight, in a fixed order; `loss_sum` gives their sums."""

    def build(self) -> torch.nn.Module:
        """A new model: fp32, on the CPU, with equal weights on every rank."""

    def trainable(self, name: str) -> bool:
        """Whether the parameter of this name is trained; the others are frozen."""

    def prepare(self, model: torch.nn.Module, units: Any, seeds: Iterable[int]) -> Batch:
        """Make this rank's units of a step into a batch. All ranks call it together, before every step.

        Args:
            model: as it is before the step, for rollouts and the like.
            units: what the feed gives, maybe none.
            seeds: one for each unit, which depends on nothing but the run's seed and the unit's number.
        """

    def weight(self, batch: Batch) -> float:
        """What a batch adds to the weight that the mean is over, such as its loss tokens; 0 for an empty one."""

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of training on a batch, for the model FLOPs utilisation; 0 where unknown."""

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro-batch on the model's device.

        Args:
            model: the model, or DeepSpeed's engine around it.
        """

    def rehearsal(self, units: int, length: int) -> Batch:
        """The batch of ``units`` units of ``length`` tokens that takes the most memory."""

    def empty(self) -> Batch:
        """A batch of weight 0 that runs through the whole model, for ranks that only fill up."""


def unit_seed(seed: int, phase: int, unit: int) -> int:
    """A 63-bit seed for one unit: a pure function of the run's seed, the phase and the unit's number."""
    digest = hashlib.blake2b(f"{seed}/{phase}/{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
