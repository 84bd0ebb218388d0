"""Connecting to a Ray cluster, and asking what it has."""

import logging
import os
from pathlib import Path

from cluster.machines.scaling import ScalingRecipe, SeatRequest
from doge.common.errors import UserError


def connect(scaling: ScalingRecipe, start: bool = True) -> bool:
    """Join the cluster at ``scaling.address``, else that of this job or machine, else start one on this machine alone.

    Args:
        start: whether to start a cluster where there is none to join.

    Returns:
        Whether there is a connection.

    Raises:
        UserError: no cluster answers at the address, or it does not take this machine's token.
    """
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Ray's own default, but for a cluster named by its address, where Ray leaves a token that is there unused.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    if ray.is_initialized():
        return True
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "auto", **quiet)
        return True
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if address is None:  # this machine belongs to no cluster
            if start:
                ray.init(address="local", include_dashboard=False, **quiet)
            return start
        raise UserError(
            f"No Ray cluster answers at {address}: start one with `ray start --head`, or leave the address out. "
            "If the cluster has a token (~/.ray/auth_token on its head), the same token is needed here."
        ) from error


def _has_token() -> bool:
    if "RAY_AUTH_TOKEN" in os.environ:
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().exists()


def resolve_seats(scaling: ScalingRecipe, most: int | None = None) -> tuple[SeatRequest, bool]:
    """The seats to ask for, and whether each has a GPU.

    Args:
        most: workers that there is work for; None is no bound.

    Raises UserError if the cluster cannot hold the smallest number of workers and the recipe does not wait.
    """
    import ray

    from cluster.machines.nodes import describe_cluster, possible_workers

    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if scaling.use_gpu is None else scaling.use_gpu
    resources = {"CPU": scaling.num_cpus_per_worker} | ({"GPU": 1} if use_gpu else {}) | scaling.resources_per_worker
    request = SeatRequest(
        resources=resources,
        min_workers=scaling.min_workers,
        max_workers=scaling.max_workers,
        most=most,
        wait_timeout_s=scaling.wait_timeout_s,
        one_per_node=scaling.num_workers is None and not use_gpu,
    )
    room = possible_workers(request)
    if room < scaling.min_workers and scaling.wait_timeout_s == 0:
        raise UserError(
            f"{scaling.min_workers} workers were asked for, but {describe_cluster()}, with room for {room}: lower "
            "--scaling.num-workers, or set --scaling.wait-timeout-s to wait for more."
        )
    return request, use_gpu
