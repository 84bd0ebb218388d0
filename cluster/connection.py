"""Connecting to a Ray cluster, and asking what it has."""

import logging
import os
from pathlib import Path

from cluster.recipe import ScalingRecipe
from doge.errors import UserError


def connect(scaling: ScalingRecipe) -> None:
    """Join the cluster of ``scaling.address``, of this job or of this machine, or start one of this machine alone.

    Raises:
        UserError: no cluster answers at the address, or it does not take this machine's token.
    """
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Ray's own default, but for a cluster named by its address, where Ray leaves a token that is there unused.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "auto", **quiet)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if address is None:  # this machine belongs to no cluster
            ray.init(address="local", include_dashboard=False, **quiet)
            return
        raise UserError(
            f"No Ray cluster answers at {address}: start one with `ray start --head`, or leave the address out; "
            "one that has a token (~/.ray/auth_token on its head) needs the same token here."
        ) from error


def _has_token() -> bool:
    if "RAY_AUTH_TOKEN" in os.environ:
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().exists()


def resolve_workers(scaling: ScalingRecipe) -> tuple[int, bool]:
    """Number of workers, and whether each gets a GPU. Raises UserError if the cluster cannot hold them."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    use_gpu = gpus > 0 if scaling.use_gpu is None else scaling.use_gpu
    num_workers = scaling.num_workers or max(1, gpus if use_gpu else 1)
    if use_gpu and num_workers > gpus:
        raise UserError(
            f"{num_workers} workers with a GPU each were asked for, but the cluster has {gpus} GPUs: "
            "lower --scaling.num-workers, or use --scaling.use-gpu False."
        )
    if num_workers * scaling.num_cpus_per_worker > cpus:
        raise UserError(
            f"{num_workers} workers need {num_workers * scaling.num_cpus_per_worker:g} CPUs, but the cluster has "
            f"{cpus:g}: lower --scaling.num-workers or --scaling.num-cpus-per-worker."
        )
    return num_workers, use_gpu
