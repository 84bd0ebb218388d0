"""What happens in a training, beside what happens to its hosts (`cluster.elastic.events`)."""

from dataclasses import dataclass
from typing import Any

from cluster.elastic.events import Event


@dataclass(frozen=True)
class MetricsMeasured(Event):
    """Numbers that belong to a step, by name.

    Args:
        step: updates made.
        metrics: the first name tells which rows are of one kind; a step has one row of a kind.
    """

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class StepMade(MetricsMeasured):
    """An update: ``loss`` (mean over the objective's weight), ``learning_rate``, ``grad_norm``, ``tokens_per_s``, …"""


@dataclass(frozen=True)
class StepSkipped(Event):
    """A step that updated nothing, since its loss or gradient was no number twice.

    Args:
        step: 1-based, as in `StepMade`.
        first: number of its first unit.
        units: how many it had.
        reason: what they gave.
    """

    step: int
    first: int
    units: int
    reason: str


@dataclass(frozen=True)
class Evaluated(MetricsMeasured):
    """An evaluation on held-out units, such as ``held_out_loss``.

    Args:
        weight: what the mean is over, such as loss tokens.
    """

    weight: float


@dataclass(frozen=True)
class MemberStarted(Event):
    """A member of a membership has made its first step.

    Args:
        step: steps made before it.
        device: name of its device.
        precision: that it computes in.
        share: units that it takes of a step.
        micro_batch_limit: most units that it takes at once.
        seconds: what came before the end of the first step, by name.
    """

    membership: int
    rank: int
    step: int
    device: str
    precision: str
    share: int
    micro_batch_limit: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class SamplesTaken(Event):
    """Which samples a member took of a step.

    Args:
        step: 0-based.
        first: number of the first unit.
        samples: where each unit lies.
    """

    step: int
    first: int
    samples: list[tuple[Any, ...]]
