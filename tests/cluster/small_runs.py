"""A recipe of a few seconds, and what its runs leave behind."""

import json
from pathlib import Path

from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict
from doge.common.storage import Storage

STEPS = 120


def hosts(run: str = "small") -> list[dict]:
    """All processes of a run that are ready to train."""
    import ray

    from cluster.elastic.coordinator import NAMESPACE, actor_name

    return ray.get(ray.get_actor(actor_name(run), namespace=NAMESPACE).members.remote())


def members(run: str = "small") -> list[dict]:
    """Those that train now, by rank."""
    return sorted((host for host in hosts(run) if host["rank"] is not None), key=lambda host: host["rank"])


def small_recipe(storage: Path, texts: dict[str, str], **changes) -> Recipe:
    """A recipe of a few seconds; ``changes`` are nested dictionaries of its keys."""
    values = {
        "name": "small",
        "storage": str(storage),
        "model": {
            "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "keep_window_size": 64,
        },
        "tokenizer": {"vocab_size": 512, "training_bytes": 100_000},
        "data": {
            "sources": {name: {"path": path, "weight": 1} for name, path in texts.items()},
            "sequence_length": 64, "held_out_sequences": 10, "held_out_fraction": 0.1,
            "documents_per_shard": 50, "files_per_stripe": 2,
        },
        "optimizer": {"lr": 3e-3},
        "lr_scheduler": {"warmup_steps": 5, "decay_steps": 10},
        "engine": {"precision": "fp32"},
        "training": {
            "max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "eval_steps": 20, "save_steps": 10,
            "logging_steps": 10, "record_samples": True,
        },
        "scaling": {"num_workers": 2, "warm_spares": 0},  # half of what a short run costs is to start its processes
    }  # fmt: skip
    return from_dict(Recipe, _merge(values, changes))


def _merge(values: dict, changes: dict) -> dict:
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = _merge(values[key], value) if isinstance(value, dict) and key in values else value
    return merged


def losses(recipe: Recipe, metric: str = "loss") -> dict[int, float]:
    """What MLflow holds of a run, by step; fails if a step was logged twice."""
    from doge.reporting.tracking import Tracker

    root = Storage(recipe.storage)
    history = Tracker(recipe.tracking, root, root / f"runs/{recipe.name}", recipe.name).history(metric)
    assert len(history) == len(dict(history)), "a step was logged twice"
    return dict(history)


def samples(recipe: Recipe) -> dict[int, dict[int, tuple]]:
    """The recorded samples: by step, from sequence number to where it lies."""
    directory = Storage(recipe.storage) / f"runs/{recipe.name}/samples"
    found: dict[int, dict[int, tuple]] = {}
    for name in directory.names():
        step = int(name.split("-")[1])
        share = {int(index): tuple(place) for index, place in json.loads(directory.read_bytes(name)).items()}
        known = found.setdefault(step, {})
        assert all(known.get(index, place) == place for index, place in share.items()), "a step's samples differ"
        known.update(share)
    return found
