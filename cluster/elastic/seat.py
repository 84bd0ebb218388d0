"""A seat: a worker of Ray Train that only reserves the resources of one host until the run is over.

Nothing heavy is imported here: a seat must be there quickly.
"""

from typing import Any

import ray
import ray.train

from cluster.elastic.membership import Seat

OVER_SECONDS = 60.0  # that one question to the coordinator may wait for its answer


def take_seat(coordinator: Any) -> None:
    """Hold a seat until the run is over. Ray Train calls this in every worker, anew after every change of its group.

    Args:
        coordinator: the actor's handle.
    """
    context, here = ray.train.get_context(), ray.get_runtime_context()
    seat = Seat(
        group=here.get_placement_group_id() or "",
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        node=here.get_node_id(),
        gpus=tuple(map(str, here.get_accelerator_ids().get("GPU", []))),
    )
    ray.get(coordinator.sit.remote(seat))
    while not ray.get(coordinator.over.remote(OVER_SECONDS)):
        pass
