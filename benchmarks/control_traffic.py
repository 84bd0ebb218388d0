"""What the workers of a step tell each other and the driver, beside their gradients.

    python benchmarks/control_traffic.py --workers 8 --steps 40

Every worker is a process of its own with the real engine of a very small model, the real outbox and a real board on a
local Ray. A step is a sleep of 0.3 s, as long as a GPU would compute, and then only what every step says: the numbers
that all ranks gather before it, the sums of the loss and the metrics after it, and what each tells the driver. Between
them the ranks wait for each other, so that one which the kernel wakes late counts as no traffic. A step's figure is
that of its slowest rank. With more workers than cores they also wait for the cores, which machines of their own do
not. The last line is one JSON object of medians: control_ms, its parts gather_ms, sums_ms and posts_ms, and
share_of_step.
"""

import argparse
import json
import statistics
import time
from typing import Any

import ray
import torch

STEP_SECONDS = 0.3
PARTS = ("gather", "sums", "posts")


class Worker:
    """One rank, as an actor."""

    def __init__(self, rank: int, size: int, address: tuple[str, int], board: Any):
        from cluster.workloads.outbox import Outbox
        from cluster.workloads.phase import Phase, TrainingSettings
        from cluster.workloads.telemetry import Reporter, Telemetry
        from doge.model.configuration import ModelRecipe
        from doge.training import process_group
        from doge.training.communicator import Communicator
        from doge.training.engine import Engine
        from doge.training.engine_recipe import EngineRecipe
        from doge.training.next_token import NextTokenPrediction
        from doge.training.optimizer import OptimizerRecipe
        from doge.training.schedule import SchedulerRecipe

        torch.set_num_threads(1)
        model = ModelRecipe(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=64, keep_window_size=64,
        )  # fmt: skip
        device, objective, optimizer = torch.device("cpu"), NextTokenPrediction(model), OptimizerRecipe()
        process_group.be_alone(device)
        replicas = Communicator(rank, size, address)
        self.engine = Engine(objective, optimizer, EngineRecipe(precision="fp32"), device, None, replicas)
        feed: Any = None  # nothing is read
        phase = Phase("sleep", objective, feed, 10**6, 8 * size, 64, optimizer, SchedulerRecipe())
        settings = TrainingSettings((phase,), EngineRecipe(), "none", {})
        self.outbox = Outbox(lambda events: board.post.remote(*events))
        reporter = Reporter(f"host-{rank}", f"node-{rank}", 0.0, self.outbox)
        self.telemetry = Telemetry(reporter, settings, phase, self.engine, 1)

    def run(self, steps: int) -> list[dict[str, float]]:
        """Seconds of every step's parts."""
        from doge.training.step_result import StepResult

        found, sums = [], torch.tensor([3.0, 1.0], dtype=torch.float64)  # the loss and the gradient norm
        for step in range(steps):
            time.sleep(STEP_SECONDS)
            self.engine.step_count = step + 1
            self._meet()
            began = time.perf_counter()
            gathered = self.engine.all_gather_floats([64.0, 0.0, STEP_SECONDS, 8.0, 0.0])
            gather = time.perf_counter()
            self._meet()
            summing = time.perf_counter()
            loss, _ = self.engine._all_reduce(sums).tolist()
            summed = time.perf_counter()
            result = StepResult(loss, 1.0, 1.0, gathered=gathered, compute_seconds=STEP_SECONDS)
            self.telemetry.step(result, 1.0, STEP_SECONDS, 0.0, 0)
            self.telemetry.time_spent({"data": 0.0, "others": 0.0, "step": STEP_SECONDS}, units=8)
            posted = time.perf_counter()
            found.append({"gather": gather - began, "sums": summed - summing, "posts": posted - summed})
        self.outbox.flush()
        return found

    def _meet(self) -> None:
        self.engine.all_gather_floats([0.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="the first five do not count (default: 40)")
    arguments = parser.parse_args()
    from cluster.runs.board import Board
    from doge.common.network import free_address

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    board = ray.remote(num_cpus=0, max_concurrency=1000)(Board).remote()
    address = free_address("127.0.0.1")
    make = ray.remote(num_cpus=0)(Worker)
    workers = [make.remote(rank, arguments.workers, address, board) for rank in range(arguments.workers)]
    ranks = ray.get([worker.run.remote(arguments.steps) for worker in workers])
    slowest = [{part: max(step[part] for step in steps) for part in PARTS} for steps in zip(*ranks, strict=True)][5:]
    figures = {f"{part}_ms": 1e3 * statistics.median(step[part] for step in slowest) for part in PARTS}
    figures["control_ms"] = 1e3 * statistics.median(sum(step.values()) for step in slowest)
    figures["share_of_step"] = figures["control_ms"] / (1e3 * STEP_SECONDS)
    for name, value in figures.items():
        print(f"{name:<16}{value:8.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()} | {"workers": arguments.workers}))


if __name__ == "__main__":
    main()
