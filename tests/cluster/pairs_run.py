"""A run of the tests' own objective, without data to prepare, a tracking store or a driver's record."""

import asyncio
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import ray
import ray.train
import reconstruct_pairs
import torch
from nodes import wait_until
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from reconstruct_pairs import ReconstructPairs

from cluster.elastic.coordinator import NAMESPACE, actor_name, open_coordinator
from cluster.elastic.seat import take_seat
from cluster.elastic.seat_trainer import SeatTrainer
from cluster.elastic.workload import Job
from cluster.machines.connection import resolve_seats
from cluster.machines.head_storage import share
from cluster.machines.scaling import ScalingRecipe
from cluster.workloads.phase import TrainingSettings
from cluster.workloads.training_events import StepMade
from doge.common.lease import Lease
from doge.common.storage import Storage
from doge.training.objective import unit_seed


class PlainBoard:
    """What hosts and coordinator need of a driver's board: it keeps every event."""

    def __init__(self):
        self._events, self._stopped = [], None

    async def post(self, *events) -> None:
        self._events.extend(events)

    async def events(self) -> list:
        return self._events

    async def settle(self) -> None:
        return None

    async def may_publish(self, membership: int) -> bool:
        return membership > 0

    async def stop(self, reason: str, unrecorded: bool = False) -> None:
        self._stopped = self._stopped or reason

    async def stopped(self) -> str | None:
        return self._stopped

    async def now(self) -> float:
        await asyncio.sleep(0)
        return time.monotonic()


class PairsRun:
    """One call of the run ``pairs`` on this node; leaving the block ends whatever there still is of it.

    Args:
        settings: of the training.
        storage: root of everything durable.
        scaling: what differs from two workers without spares.
    """

    def __init__(self, settings: TrainingSettings, storage: Storage, **scaling):
        for module in (reconstruct_pairs, sys.modules[__name__]):  # the workers' processes know no tests
            ray.cloudpickle.register_pickle_by_value(module)
        self.settings, self.storage, self.name = settings, share(storage), "pairs"
        self.scaling = ScalingRecipe(**{"num_workers": 2, "use_gpu": False, "warm_spares": 0} | scaling)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(PlainBoard).remote()

    def __enter__(self) -> "PairsRun":
        self.lease = Lease(self.storage / f"runs/{self.name}", "the test")
        self.lease.acquire()
        job = Job(
            self.name, "cluster.workloads.training_workload:TrainingWorkload", self.settings, self.storage,
            self.lease.claim, self.board, use_gpu=False,
        )  # fmt: skip
        self.coordinator = open_coordinator(self.name, job, self.scaling)
        seats, _ = resolve_seats(self.scaling)
        self.trainer = SeatTrainer(
            take_seat, self.coordinator, seats, f"pairs-{time.time_ns()}", self.storage.path("ray_train")
        )
        self.conducted = self.coordinator.conduct.remote()
        self.thread = threading.Thread(target=self.hold_seats, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.thread.is_alive():  # as Ctrl-C does it
            self.trainer.give_up()
        ray.kill(self.coordinator)  # its hosts end with it
        self.thread.join(30)
        self.lease.release()

    def hold_seats(self) -> None:
        with suppress(ray.train.TrainingFailedError, ray.exceptions.RayError):  # the run is ended
            self.trainer.fit()

    def events(self, kind: type) -> list:
        return [event for event in ray.get(self.board.events.remote()) if isinstance(event, kind)]

    def reach(self, step: int) -> None:
        wait_until(lambda: any(event.step >= step for event in self.events(StepMade)), 150, f"step {step}")

    def hosts(self) -> list[dict]:
        """All processes that are ready to train, as the coordinator tells of them."""
        found = ray.get(ray.get_actor(actor_name(self.name), namespace=NAMESPACE).members.remote())
        assert all(host["node"] == ray.get_runtime_context().get_node_id() for host in found)
        return found

    def kill_rank(self, rank: int) -> None:
        os.kill(next(host["pid"] for host in self.hosts() if host["rank"] == rank), signal.SIGKILL)

    def is_over(self) -> bool:
        return bool(ray.wait([self.conducted], timeout=0)[0])

    def finish(self, timeout_s: float = 90) -> None:
        ray.get(self.conducted, timeout=timeout_s)
        assert ray.get(self.board.stopped.remote()) is None


def one_process(settings: TrainingSettings) -> tuple[dict[int, tuple[float, float, float]], torch.nn.Module, dict]:
    """By step (loss, gradient norm, masked tokens a pair), the model, and the last moments, by plain PyTorch."""
    model, results, made = settings.phases[0].objective.build(), {}, 0
    moments: dict = {}
    for number, phase in enumerate(settings.phases):
        objective, feed = ReconstructPairs(phase.objective.trained), phase.feed
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(objective.trainable(name))
        optimizer = phase.optimizer.build(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(made))} | moments.get(name, zeros)
        for step in range(phase.steps):
            units = range(step * phase.units_per_step, (step + 1) * phase.units_per_step)
            seeds = [unit_seed(settings.seed, number, unit) for unit in units]
            batch = objective.prepare(model, feed.read(units.start, units.stop), seeds)
            sums = objective.loss_sum(model, batch)
            optimizer.zero_grad()
            (sums.loss / len(units)).backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, phase.optimizer.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * phase.lr_scheduler.factor(step, phase.steps)
            optimizer.step()
            made += 1
            results[made] = tuple(
                number.item() / size
                for number, size in ((sums.loss, len(units)), (norm, 1), (sums.metrics["masked_tokens"], len(units)))
            )
        moments = {
            name: {key: optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    return results, model, moments
