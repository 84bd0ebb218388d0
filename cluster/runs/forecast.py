"""Forecast of a run on the present machines: workers, shares, time and cost, before anything starts.

Speeds come from earlier runs of the same model, which leave theirs under the storage root.
"""

import hashlib
import json
import os
from collections import Counter

from cluster.machines.connection import connect, resolve_seats
from cluster.runs.console import Console
from cluster.runs.recipe import Recipe
from cluster.workloads.shares import plan_shares
from doge.common.config_tree import to_dict
from doge.common.storage import Storage
from doge.common.words import count, duration

Speeds = dict[str, float]
"""Tokens per second of one worker, by the name of its device."""


def remember_speeds(recipe: Recipe, storage: Storage, speeds: Speeds) -> None:
    """Store measured speeds for later forecasts."""
    known = known_speeds(recipe, storage)
    storage.write_bytes(_file(recipe), json.dumps(known | speeds, indent=1).encode())


def known_speeds(recipe: Recipe, storage: Storage) -> Speeds:
    try:
        return {device: float(speed) for device, speed in json.loads(storage.read_bytes(_file(recipe))).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def _file(recipe: Recipe) -> str:
    """Name of the file for runs in which a device is equally fast."""
    training, engine = recipe.training, recipe.engine
    values = [
        to_dict(recipe.model), recipe.data.sequence_length, engine.precision, engine.zero_stage,
        training.gradient_checkpointing, training.micro_batch_size,
    ]  # fmt: skip
    return f"speeds/{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}.json"


def dry_run(recipe: Recipe, console: Console) -> None:
    """Print the plan for the cluster that this process finds, or for this machine alone; starts nothing."""
    recipe.check()
    devices = devices_of_cluster(recipe) if connect(recipe.scaling, start=False) else devices_of_machine(recipe)
    console.table([*recipe.plan(), *forecast(recipe, devices, known_speeds(recipe, Storage(recipe.storage)))])


def forecast(recipe: Recipe, devices: list[str], speeds: Speeds) -> list[tuple[str, str]]:
    """The forecast for workers on these devices, as ``(label, text)`` lines."""
    training, scaling = recipe.training, recipe.scaling
    if len(devices) < scaling.min_workers:
        least = count(scaling.min_workers, "worker")
        wait = f"waits {scaling.wait_timeout_s:g} s for them" if scaling.wait_timeout_s else "ends at once"
        return [("workers", f"room for {len(devices) or 'none'} now, {least} at least: the run {wait}")]
    counted = Counter(devices)
    rows = [("workers", ", ".join(f"{number} × {device}" for device, number in counted.items()))]
    own = [_speed(device, speeds) for device in devices]
    missing = [device for device, speed in zip(devices, own, strict=True) if speed is None]
    known = [speed for speed in own if speed is not None] or [1.0]
    mean = sum(known) / len(known)
    likely = [speed or mean for speed in own]
    if scaling.shares == "equal":
        likely = [1.0] * len(devices)
    limit = training.micro_batch_size or training.global_batch_size
    shares = plan_shares(training.global_batch_size, likely, [limit] * len(devices), recipe.engine.zero_stage >= 2)
    text = f"{' + '.join(map(str, shares.counts))} sequences a step"
    if missing:
        text += ", until the first steps show how fast each worker is"
    rows.append(("shares", text))
    if missing:
        name = next(iter(missing))
        rows.append(("time", f"unknown before the first steps: no earlier run of this model on {name}"))
        return rows
    length, tokens = recipe.data.sequence_length, training.global_batch_size * recipe.data.sequence_length
    step_seconds = max(count * length / speed for count, speed in zip(shares.counts, known, strict=True) if count)
    seconds = training.max_steps * step_seconds
    rate = tokens / step_seconds
    rows.append(("time", f"about {duration(seconds)} at {rate:,.0f} tokens/s, as earlier runs on these devices went"))
    prices = [recipe.ledger.price_per_hour(device) for device in devices]
    given = [price for price in prices if price is not None]
    if len(given) == len(prices):
        cost = sum(given) * seconds / 3600
        rows.append(("cost", f"about {recipe.ledger.currency}{cost:,.2f}, electricity not counted"))
    else:
        unpriced = next(device for device, price in zip(devices, prices, strict=True) if price is None)
        rows.append(("cost", f"unknown, no price for {unpriced}: set ledger.prices_per_hour"))
    return rows


def _speed(device: str, speeds: Speeds) -> float | None:
    """Ray names a GPU by a part of its full name."""
    if device in speeds:
        return speeds[device]
    return next((speed for name, speed in speeds.items() if device in name), None)


def devices_of_machine(recipe: Recipe) -> list[str]:
    """The devices of the workers that this machine alone would have."""
    import torch

    scaling = recipe.scaling
    gpus = torch.cuda.device_count() if scaling.use_gpu in (None, True) else 0
    names = [torch.cuda.get_device_name(gpu) for gpu in range(gpus)]
    return names[: scaling.max_workers] if gpus or scaling.use_gpu else _cpus(recipe, [os.cpu_count() or 1])


def devices_of_cluster(recipe: Recipe) -> list[str]:
    """The devices of the workers that the cluster to which this process is connected would have now."""
    from cluster.machines.nodes import look, possible_workers

    seats, use_gpu = resolve_seats(recipe.scaling, recipe.training.global_batch_size)
    room, free = possible_workers(seats), look(busy=False).free
    if not use_gpu:
        nodes = sorted((int(node.get("CPU", 1)) for node in free.values()), reverse=True)
        return _cpus(recipe, nodes)[:room]
    names = []
    for node in free.values():
        kinds = [name.removeprefix("accelerator_type:") for name in node if name.startswith("accelerator_type:")]
        names += [kinds[0] if kinds else "GPU"] * int(node.get("GPU", 0))
    return names[:room]


def _cpus(recipe: Recipe, cores: list[int]) -> list[str]:
    """Device names of CPU workers that are spread evenly over nodes with these numbers of cores."""
    from doge.common.hardware import cpu_name

    number = len(cores) if recipe.scaling.num_workers is None else recipe.scaling.max_workers
    on_node = Counter(place % len(cores) for place in range(number or 1))
    return [
        cpu_name(max(1, cores[node] // workers)) for node, workers in sorted(on_node.items()) for _ in range(workers)
    ]
