"""What a worker of Ray Train does: hold the resources of one worker, and say so, until the run is over.

Nothing heavy is imported here: a seat must be there quickly.
"""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train

from cluster.elastic.membership import Seat


@dataclass(frozen=True)
class SeatConfig:
    coordinator: Any
    """The coordinator's actor handle."""


def take_seat(config: SeatConfig) -> None:
    """Ray Train calls it in every worker, anew after every change of its group."""
    context, here = ray.train.get_context(), ray.get_runtime_context()
    seat = Seat(
        group=here.get_placement_group_id() or "",
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        node=here.get_node_id(),
        gpus=tuple(map(str, here.get_accelerator_ids().get("GPU", []))),
    )
    ray.get(config.coordinator.sit.remote(seat))
    ray.get(config.coordinator.over.remote())
