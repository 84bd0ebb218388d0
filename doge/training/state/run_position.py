"""Where a run stands, beside its tensors: what a checkpoint must remember to go on with the same samples."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunPosition:
    """The resume state of the data is (phase, unit); the rest says what the run is.

    Args:
        feed: fingerprint of the phase's feed.
        tokenizer: fingerprint of the tokenizer, without which the weights mean nothing.
        phase: index of the phase that the next step belongs to.
        next_unit: number of the first unit of the next step in that phase's feed.
        tokens_seen: tokens of all units that were trained on.
        recipe: the resolved recipe as nested dictionaries.
    """

    feed: str
    tokenizer: str
    phase: int = 0
    next_unit: int = 0
    tokens_seen: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, in the layout of every checkpoint so far."""
        position = {
            "data_plan": self.feed,
            "tokenizer": self.tokenizer,
            "phase": self.phase,
            "next_sequence": self.next_unit,
            "tokens_seen": self.tokens_seen,
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
            values["recipe"],
        )
