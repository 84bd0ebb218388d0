"""An objective that only the tests know, in two phases, the first mostly frozen: killed in each, and resumed."""

import asyncio
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import ray.train
import reconstruct_pairs
import torch
from nodes import wait_until
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from reconstruct_pairs import PairFeed, ReconstructPairs

from cluster.elastic.coordinator import NAMESPACE, actor_name, open_coordinator
from cluster.elastic.events import MembershipFormed
from cluster.elastic.seat import take_seat
from cluster.elastic.seat_trainer import SeatTrainer
from cluster.elastic.workload import Job
from cluster.machines.connection import resolve_seats
from cluster.machines.scaling import ScalingRecipe
from cluster.workloads.phase import Phase, TrainingSettings
from cluster.workloads.side_tasks import Evaluation
from cluster.workloads.training_events import Evaluated, SamplesTaken, StepMade
from doge.common.lease import Lease
from doge.common.storage import Storage
from doge.training.engine_recipe import EngineRecipe
from doge.training.objective import unit_seed
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe
from doge.training.state.checkpoint import Checkpoints

UNITS, STEPS = 12, (24, 24)
OPTIMIZER = OptimizerRecipe(lr=1e-2, max_grad_norm=0.5)
SCHEDULE = SchedulerRecipe(warmup_steps=4, decay_steps=8)
EVALUATION = Evaluation(PairFeed("held out"), 10, every=100)
FIRST = Phase(
    "head alone", ReconstructPairs("head", pause=0.05), PairFeed("first"), STEPS[0], UNITS, 70, OPTIMIZER, SCHEDULE,
    side_tasks=(EVALUATION,),
)  # fmt: skip
SECOND = Phase(
    "everything", ReconstructPairs("", pause=0.05), PairFeed("second"), STEPS[1], UNITS, 70, OPTIMIZER, SCHEDULE
)
SETTINGS = TrainingSettings(
    phases=(FIRST, SECOND), engine=EngineRecipe(precision="fp32"), tokenizer="none", recipe={}, seed=7, save_steps=6,
    micro_batch_size=3, record_samples=True,
)  # fmt: skip


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


class Run:
    """One call of a run with two workers; leaving the block ends whatever there still is of it."""

    def __init__(self, storage: Storage, gate: Path):
        self.storage, self.name = storage, "pairs"
        first, second = SETTINGS.phases
        held = replace(first, objective=replace(first.objective, gate=str(gate)))
        self.settings = replace(SETTINGS, phases=(held, second))
        self.scaling = ScalingRecipe(num_workers=2, use_gpu=False, warm_spares=0)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(PlainBoard).remote()

    def __enter__(self) -> "Run":
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

    def kill_rank(self, rank: int) -> None:
        members = ray.get(ray.get_actor(actor_name(self.name), namespace=NAMESPACE).members.remote())
        pid, node = next((member["pid"], member["node"]) for member in members if member["rank"] == rank)
        assert node == ray.get_runtime_context().get_node_id()
        os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        ray.get(self.conducted, timeout=90)
        assert ray.get(self.board.stopped.remote()) is None


def one_process() -> tuple[dict[int, tuple[float, float, float]], torch.nn.Module, dict, float]:
    """By step (loss, gradient norm, masked tokens a pair), the model, the last moments, the held-out loss."""
    model, results, made = FIRST.objective.build(), {}, 0
    moments, held_out = {}, 0.0
    for number, phase in enumerate(SETTINGS.phases):
        objective, feed = ReconstructPairs(phase.objective.trained), phase.feed
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(objective.trainable(name))
        optimizer = OPTIMIZER.build(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(made))} | moments.get(name, zeros)
        for step in range(phase.steps):
            units = range(step * UNITS, (step + 1) * UNITS)
            seeds = [unit_seed(SETTINGS.seed, number, unit) for unit in units]
            batch = objective.prepare(model, feed.read(units.start, units.stop), seeds)
            sums = objective.loss_sum(model, batch)
            optimizer.zero_grad()
            (sums.loss / UNITS).backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr * SCHEDULE.factor(step, phase.steps)
            optimizer.step()
            made += 1
            results[made] = (sums.loss.item() / UNITS, norm.item(), sums.metrics["masked_tokens"].item() / UNITS)
        names = dict(model.named_parameters())
        moments = {
            name: {key: optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            for name, p in names.items()
            if p.requires_grad
        }
        if number == 0:
            seeds = [unit_seed(SETTINGS.seed, 0, unit) for unit in range(10)]
            batch = objective.prepare(model, EVALUATION.feed.read(0, 10), seeds)
            held_out = objective.loss_sum(model, batch).loss.item() / 10
    return results, model, moments, held_out


def test_killed_in_each_of_two_phases_and_resumed_it_makes_the_steps_of_one_process(ray_cluster, tmp_path):
    for module in (reconstruct_pairs, sys.modules[__name__]):  # the workers' processes know no tests
        ray.cloudpickle.register_pickle_by_value(module)
    storage, gate = Storage(str(tmp_path / "storage")), tmp_path / "gate"
    events, metrics = [], []
    checkpoints = Checkpoints(storage / "runs/pairs/checkpoints")
    with Run(storage, gate) as run:
        run.reach(8)
        run.kill_rank(1)  # in the first phase
        run.reach(14)
        gate.touch()
        events += run.events(SamplesTaken)
        metrics += run.events(StepMade)  # the block ends the run amid the first phase, at a step that all wait before
    gate.unlink()
    with Run(storage, gate) as run:  # resumed in the first phase
        run.reach(STEPS[0] + 8)
        run.kill_rank(0)  # in the second phase, the one that commits
        run.finish()
        events += run.events(SamplesTaken)
        metrics += run.events(StepMade)
        evaluated = run.events(Evaluated)
        starts = [event.from_step for event in run.events(MembershipFormed)]
    assert starts[0] in range(12, STEPS[0])
    assert STEPS[0] in starts  # the second phase begins in a membership of its own
    assert starts[-1] > STEPS[0]
    expected, model, moments, held_out = one_process()

    for step in range(sum(STEPS)):
        phase, within = (FIRST, step) if step < STEPS[0] else (SECOND, step - STEPS[0])
        taken = {
            event.first + at: tuple(sample)
            for event in events
            if event.step == step
            for at, sample in enumerate(event.samples)
        }
        assert taken == {
            unit: (unit, len(phase.feed.pair(unit)[1])) for unit in range(within * UNITS, (within + 1) * UNITS)
        }
    shares = {len(event.samples) for event in events}
    assert len(shares) > 1, "the shares were never unequal"

    found = {event.step: event.metrics for event in metrics}
    assert sorted(found) == list(range(1, sum(STEPS) + 1))
    for step, (loss, norm, masked) in expected.items():
        assert found[step]["loss"] == pytest.approx(loss, abs=1e-6)
        assert found[step]["grad_norm"] == pytest.approx(norm, abs=1e-5)
        assert found[step]["masked_tokens"] == pytest.approx(masked)
    assert [event.metrics["held_out_loss"] for event in evaluated] == [pytest.approx(held_out, abs=1e-5)]

    state, position = checkpoints.latest()
    assert (state.step, position.phase, position.next_unit) == (sum(STEPS), 1, STEPS[1] * UNITS)
    for name, parameter in model.named_parameters():
        assert torch.allclose(state.parameters[name], parameter, rtol=0, atol=1e-5), name
        for key, moment in moments[name].items():
            assert torch.allclose(state.moments[key][name], moment, rtol=0, atol=1e-6), name
