"""Connecting to a Ray cluster, and asking what it has."""

import logging
import os
import re
import socket
from pathlib import Path

from cluster.machines.scaling import ScalingRecipe, SeatRequest
from doge.common.errors import UserError

GCS_PORT = 6379  # Ray's default
ANSWER_SECONDS = 4.0  # for whatever listens at an address to take a connection, and to answer

_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's frame of this type, 4, begins what each side says; gRPC is spoken over it
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS


def connect(scaling: ScalingRecipe, start: bool = True) -> bool:
    """Join the cluster at ``scaling.address``, else that of this job or machine, else start one on this machine alone.

    Args:
        start: whether to start a cluster where there is none to join.

    Returns:
        Whether there is a connection.

    Raises:
        UserError: the address is none of a cluster, none answers there, it has another version of Ray or Python, or it
            does not take this machine's token.
    """
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no other cluster by itself once this one is left
    # Ray's own default, but for a cluster named by its address, where Ray leaves a token that is there unused.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    if ray.is_initialized():
        return True
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    given = scaling.address or os.environ.get("RAY_ADDRESS") or None
    address = given or "auto"
    if address not in ("auto", "local"):
        _check_address(address)
    try:
        if address != "local":
            ray.init(address=address, **quiet)
            return True
    except Exception as error:  # Ray has a kind of its own for each reason, and wraps one in another
        absent = isinstance(error, (ConnectionError, ray.exceptions.AuthenticationError))
        if _versions(error) or given or not absent:
            raise _refused(address, error) from error
    if start:  # this machine belongs to no cluster, or to none of this user's
        ray.init(address="local", include_dashboard=False, **quiet)
    return start


def _refused(address: str, error: Exception) -> UserError:
    """Why Ray did not let this process join the cluster at an address."""
    place = "of this machine" if address == "auto" else f"at {address}"
    other = "set --scaling.address local to start one for this run alone"
    if versions := _versions(error):
        (theirs, their_python), (ours, our_python) = versions
        return UserError(
            f"The Ray cluster {place} runs Ray {theirs} with Python {their_python}, and this process Ray {ours} with "
            f"Python {our_python}: install the same versions on both sides, or {other}."
        )
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"The Ray cluster {place} cannot be joined ({reason}): start one with `ray start --head`, add this machine to "
        f"it with `ray start --address=…`, or {other}. If the cluster has a token (~/.ray/auth_token on its head), the "
        "same token is needed here."
    )


def _check_address(address: str) -> None:
    """Raise UserError where an address is none of a cluster, or nothing listens there: Ray itself takes long."""
    of = "(scaling.address or RAY_ADDRESS)"
    right = f"give HOST:PORT, such as 10.0.0.1:{GCS_PORT}, or leave it out for this machine's cluster"
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"The address {address} {of} is that of Ray's job server: {right}, or submit the command with `ray job "
            "submit`."
        )
    if address.startswith("ray://"):
        raise UserError(
            f"The address {address} {of} is that of a Ray Client server, and the driver of a run must be on a node of "
            f"the cluster: {right}, or submit the command with `ray job submit`."
        )
    if "://" not in address and ("/" in address or address.startswith("~")):
        raise UserError(f"The address {address} {of} is a path: {right}.")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "://" in address:
        raise UserError(f"The address {address} {of} is none of a Ray cluster: {right}.")
    reason = "what listens there is something else"
    try:
        if _speaks_grpc(host.strip("[]"), int(port)):
            return
    except TimeoutError:
        reason = "it takes too long"
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
        f"No Ray cluster answers at {address} ({reason}): start one with `ray start --head`, or leave the address out."
    )


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether what listens there answers as Ray's head does, within `ANSWER_SECONDS`; raises OSError."""
    with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return True
        connection.sendall(_GREETING)
        return connection.recv(len(_SETTINGS))[3:4] == _SETTINGS[3:4]


def _versions(error: BaseException | None) -> list[tuple[str, str]]:
    """Versions of Ray and Python on both sides, the cluster's first, if they are what an error is about."""
    while error is not None:
        if "Version mismatch" in str(error):
            found = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
            return found if len(found) == 2 else []
        error = error.__cause__ or error.__context__
    return []


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
