"""What one writes from Ray Train's documentation to train a model elastically: the baseline of `recovery.py`.

    RAY_ADDRESS=127.0.0.1:6379 python benchmarks/plain_elastic.py --recipe recipe.yaml --notes notes.jsonl

`TorchTrainer` with one to two workers of DDP over gloo, a checkpoint by `ray.train.report` every `save_steps` steps,
`ray.train.get_checkpoint` to go on from it, and Ray Train's defaults for everything else. Model, optimizer, batch and
steps are those of a recipe of ours; the tokens are random ones, which spares it the reading of data. Every worker
notes that it has started, and rank 0 every optimizer step.
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict


def train_loop(config: dict) -> None:
    """Runs in every worker."""
    import tempfile
    import time

    import ray.train.torch
    import torch

    from doge.model.modeling import build_model

    recipe, training = config["recipe"], config["recipe"].training
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()

    def note(**content) -> None:
        with open(config["notes"], "a") as notes:
            notes.write(json.dumps(content | {"time": time.monotonic(), "group": group[0], "workers": workers}) + "\n")

    group = [os.getpid()]  # rank 0's process names the group
    torch.distributed.broadcast_object_list(group)
    note(kind="worker", rank=rank, pid=os.getpid(), node=ray.get_runtime_context().get_node_id())

    torch.manual_seed(training.seed)
    plain = build_model(recipe.model.build())
    model = ray.train.torch.prepare_model(plain)
    optimizer = recipe.optimizer.build(plain)
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    share = training.global_batch_size // workers
    for step in range(first, training.max_steps):
        generator = torch.Generator().manual_seed(step * workers + rank)
        shape = (share, recipe.data.sequence_length)
        tokens = torch.randint(recipe.tokenizer.vocab_size, shape, generator=generator)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            note(kind="step", step=step + 1)
        if (step + 1) % training.save_steps == 0:
            metrics = {"step": step + 1, "loss": loss.item()}
            if rank > 0:
                ray.train.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, Path(folder, "state.pt"))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file of a recipe of ours")
    parser.add_argument("--notes", required=True, help="file for a line of JSON for every worker and step")
    arguments = parser.parse_args()
    import ray.train
    from ray.train.torch import TorchTrainer

    from cluster.machines.scaling import SeatRequest

    recipe = from_dict(Recipe, yaml.safe_load(Path(arguments.recipe).read_text()))
    ray.init()
    TorchTrainer(
        train_loop,
        train_loop_config={"recipe": recipe, "notes": arguments.notes},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(recipe.scaling.min_workers, recipe.scaling.max_workers),
            resources_per_worker={"CPU": recipe.scaling.num_cpus_per_worker} | recipe.scaling.resources_per_worker,
            elastic_resize_monitor_interval_s=SeatRequest().interval_s,
        ),
        run_config=ray.train.RunConfig(
            name=recipe.name,
            storage_path=str(Path(recipe.storage, "plain_elastic")),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.training.save_total_limit),
        ),
    ).fit()


if __name__ == "__main__":
    main()
