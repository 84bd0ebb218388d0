"""What the members of a training do together between two steps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.workloads.shares import plan_shares
from cluster.workloads.training_events import Evaluated
from data_pipelines.order.feed import FeedConfig

if TYPE_CHECKING:
    from cluster.workloads.training_loop import TrainingLoop


@dataclass(frozen=True)
class Evaluation:
    """The mean loss on held-out units.

    Args:
        feed: the held-out units.
        units: how many of them.
        every: steps between two evaluations.
    """

    feed: FeedConfig
    units: int
    every: int
    kind: str = "evaluation"

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0

    def run(self, loop: "TrainingLoop") -> None:
        engine, pace = loop.engine, loop.pace
        shares = plan_shares(self.units, pace.speeds, pace.limits, engine.equal_micro_batches)
        own = shares.ranges(0)[loop.rank]
        units = loop.read(self.feed, own)
        batch = loop.objective.prepare(engine.module, units, loop.seeds(own))
        loss, weight = engine.evaluate(shares.pieces(loop.rank, batch))
        if loop.rank == 0:
            loop.post(Evaluated(engine.step_count, {"held_out_loss": loss}, weight))
