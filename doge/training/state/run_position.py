"""Where a run stands, beside its tensors: what a checkpoint must remember to go on with the same samples."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class RunningMean:
    """The mean of the latest losses: plain at first, then with an exponential window of ``STEPS`` steps.

    Args:
        steps: that it is over; no more than the window's are counted.
    """

    STEPS: ClassVar[int] = 50

    mean: float = 0.0
    steps: int = 0

    def with_loss(self, loss: float) -> "RunningMean":
        steps = min(self.steps + 1, self.STEPS)
        return RunningMean(self.mean + (loss - self.mean) / steps, steps)

    def bound(self, factor: float) -> float:
        """``factor`` times the mean, as far above it where it is negative; infinite until the window is full."""
        return math.inf if self.steps < self.STEPS else self.mean + (factor - 1) * abs(self.mean)


@dataclass(frozen=True)
class RunPosition:
    """The resume state of the data is (phase, unit); the rest says what the run is.

    Args:
        feed: fingerprint of the phase's feed.
        tokenizer: fingerprint of the tokenizer, without which the weights mean nothing.
        phase: index of the phase that the next step belongs to.
        next_unit: number of the first unit of the next step in that phase's feed.
        tokens_seen: tokens of all units that were trained on.
        loss: of the phase's latest steps, by which a spike is told.
        recipe: the resolved recipe as nested dictionaries.
    """

    feed: str
    tokenizer: str
    phase: int = 0
    next_unit: int = 0
    tokens_seen: int = 0
    loss: RunningMean = RunningMean()
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, in the layout of every checkpoint so far."""
        position = {
            "data_plan": self.feed,
            "tokenizer": self.tokenizer,
            "phase": self.phase,
            "next_sequence": self.next_unit,
            "tokens_seen": self.tokens_seen,
            "loss": [self.loss.mean, self.loss.steps],
        }
        return {"position": position, "recipe": self.recipe}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunPosition":
        """The position that `to_dict` wrote; raises KeyError for anything else."""
        position = values["position"]
        return cls(
            position["data_plan"],
            position["tokenizer"],
            position.get("phase", 0),  # a run had one phase once
            position["next_sequence"],
            position["tokens_seen"],
            RunningMean(*position.get("loss", ())),
            values["recipe"],
        )
