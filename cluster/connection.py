"""Connecting to a Ray cluster, and asking what it has."""

import logging
import os

from cluster.recipe import ScalingRecipe
from doge.errors import UserError


def connect(scaling: ScalingRecipe) -> None:
    """Join the cluster of ``scaling.address``, of this job or of this machine, or start one of this machine alone.

    Raises:
        UserError: no cluster answers at the address.
    """
    # Accelerators stay visible to actors that reserve none (the checkpoint of a CPU run opens on a GPU machine too).
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=scaling.address, include_dashboard=False, **options)
    except ValueError:  # an existing cluster does not take include_dashboard
        ray.init(address=scaling.address, **options)
    except ConnectionError as error:
        raise UserError(
            f"No Ray cluster answers at {scaling.address}: start one with `ray start --head`, "
            "or leave out --scaling.address."
        ) from error


def resolve_workers(scaling: ScalingRecipe) -> tuple[int, bool]:
    """Number of workers, and whether each gets a GPU. Raises UserError if the cluster cannot hold them."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    use_gpu = gpus > 0 if scaling.use_gpu is None else scaling.use_gpu
    num_workers = scaling.num_workers or (gpus if use_gpu else 1)
    if use_gpu and num_workers > gpus:
        raise UserError(
            f"{max(num_workers, 1)} workers with a GPU each were asked for, but the cluster has {gpus} GPUs: "
            "lower --scaling.num-workers, or use --scaling.use-gpu False."
        )
    if num_workers * scaling.num_cpus_per_worker > cpus:
        raise UserError(
            f"{num_workers} workers need {num_workers * scaling.num_cpus_per_worker:g} CPUs, but the cluster has "
            f"{cpus:g}: lower --scaling.num-workers or --scaling.num-cpus-per-worker."
        )
    return max(num_workers, 1), use_gpu
