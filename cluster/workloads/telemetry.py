"""What a member of a training posts to the driver: metrics, samples, and where its time went."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.accounts.ledger import StepRecord
from cluster.elastic.events import Event, Message
from cluster.workloads.outbox import Outbox
from cluster.workloads.phase import Phase, TrainingSettings
from cluster.workloads.training_events import MemberStarted, MetricsMeasured, SamplesTaken, StepMade
from data_pipelines.order.feed import Units
from doge.common.hardware import device_name, energy_joules, peak_memory_bytes, peak_tflops
from doge.model.compilation import graph_breaks, tell_graph_breaks
from doge.model.experts import pop_expert_usage, track_expert_usage
from doge.training.engine import Engine
from doge.training.step_result import StepResult


@dataclass(frozen=True)
class Reporter:
    """How a host's events reach the driver.

    Args:
        host: name of the host.
        node: name of its node.
        clock_offset: seconds to add to this machine's monotonic clock for the driver's.
        outbox: sends its events.
    """

    host: str
    node: str
    clock_offset: float
    outbox: Outbox

    def post(self, event: Event, urgent: bool = True) -> None:
        """Send an event to the driver, now or soon."""
        self.outbox.post(event, urgent)


class Telemetry:
    """Posts what one rank of one membership does.

    Args:
        reporter: of the host.
        settings: of the training.
        phase: that the membership steps in.
        engine: whose steps are told of.
        membership: its number.
    """

    def __init__(self, reporter: Reporter, settings: TrainingSettings, phase: Phase, engine: Engine, membership: int):
        self._reporter, self._settings, self._phase, self._engine = reporter, settings, phase, engine
        self._membership = membership
        self._device = device_name(engine.device)
        self._peak_tflops = settings.peak_tflops or peak_tflops(engine.device)
        self._energy = energy_joules(engine.device)
        track_expert_usage(engine.module)

    def step(self, result: StepResult, lr_factor: float, seconds: float, waited: float, tokens_seen: int) -> StepMade:
        """The metrics of the step just made, which rank 0 posts.

        Args:
            seconds: that the step took.
            waited: of these, for data.
        """
        phase, engine = self._phase, self._engine
        units_per_s = phase.units_per_step / seconds
        metrics = {
            "loss": result.loss,
            "learning_rate": phase.optimizer.lr * lr_factor,
            "grad_norm": result.grad_norm,
            "tokens_per_s": units_per_s * phase.unit_tokens,
            "tokens_seen": float(tokens_seen),
            "data_wait_s": waited,
            "peak_memory_gib": peak_memory_bytes(engine.device) / 2**30,
            "workers": float(engine.world_size),
        }
        if self._peak_tflops and result.flops:
            metrics["mfu"] = result.flops / (seconds * engine.world_size * self._peak_tflops * 1e12)
        if engine.compiled:
            metrics["graph_breaks"] = float(graph_breaks().total())
            if (sentence := tell_graph_breaks()) is not None:
                self._reporter.post(Message(f"Worker {engine.rank}: {sentence}"))
        made = StepMade(engine.step_count, metrics | result.metrics)
        if engine.rank > 0:
            return made
        self._reporter.post(made)
        if engine.step_count % self._settings.logging_steps == 0 and (usage := pop_expert_usage(engine.module)):
            means = {f"experts/{key}": sum(layer[key] for layer in usage) / len(usage) for key in usage[0]}
            self._reporter.post(MetricsMeasured(engine.step_count, means))
        return made

    def samples(self, step: int, own: range, units: Units) -> None:
        """Post where this rank's units of a step lie, if that is to be recorded."""
        if self._settings.record_samples:
            self._reporter.post(SamplesTaken(step, own.start, [tuple(sample) for sample in units.samples]))

    def started(self, share: int, micro_batch_limit: int, seconds: Mapping[str, float]) -> None:
        """Post that this rank has made its first step."""
        engine = self._engine
        precision = str(engine.dtype).removeprefix("torch.")
        self._reporter.post(
            MemberStarted(
                self._membership, engine.rank, engine.step_count - 1, self._device, precision, share,
                micro_batch_limit, dict(seconds),
            )
        )  # fmt: skip

    def time_spent(self, spent: Mapping[str, float], ended: float | None = None, units: int = 0) -> None:
        """Post where this rank's time went since it last did so.

        Args:
            spent: seconds by kind.
            ended: when, by this machine's monotonic clock; now by default.
            units: that it took of the step; 0 for no step.
        """
        energy = energy_joules(self._engine.device)
        used = energy - self._energy if energy is not None and self._energy is not None else None
        self._energy = energy
        reporter, ended = self._reporter, time.monotonic() if ended is None else ended
        reporter.post(
            StepRecord(
                reporter.host, reporter.node, self._device, self._membership, self._engine.step_count,
                ended + reporter.clock_offset, dict(spent), units, used,
            ),
            urgent=False,
        )  # fmt: skip
