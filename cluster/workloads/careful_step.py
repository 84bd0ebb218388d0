"""A step whose loss or gradient is no number, or whose loss is a spike: tried twice, then left out or the run's end."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.workloads.training_events import StepSkipped
from doge.common.errors import UserError
from doge.training.step_result import StepRefused, StepResult

if TYPE_CHECKING:
    from cluster.workloads.training_loop import TrainingLoop

FAREWELL_SECONDS = 60  # for the last good state to be written before a run that failed ends


def careful_step(loop: "TrainingLoop", step: int, make: Callable[[float], StepResult]) -> StepResult | None:
    """Make a step; None where its units are left out, since they gave no number, or a spike, twice.

    All ranks come to the same end, for they see the same loss and norm.

    Args:
        step: updates made before it.
        make: makes it, unless the loss is beyond the number that it is called with.

    Raises:
        UserError: the recipe asks to stop there.
    """
    settings = loop.settings
    bound = math.inf if settings.on_spike == "off" else loop.position.loss.bound(settings.spike_factor)
    try:
        result = make(bound)
    except StepRefused as error:
        if loop.rank == 0:
            loop.workload.say(f"In step {step + 1:,} {error}: the step is tried once more.")
        try:
            result = make(bound)
        except StepRefused as again:
            if (settings.on_spike if again.is_spike else settings.on_nonfinite) == "stop":
                raise _end(loop, step, again) from None
            loop.engine.skip()
            _tell(loop, step, again)
            if again.is_spike:
                _note(loop, bound)  # so that a level which stays becomes the usual one
            return None
    found = StepRefused(result.loss, result.grad_norm, bound)  # only where the state is partitioned, and updated
    if not found.is_spike or (result.loss > bound and settings.on_spike == "stop"):
        raise _end(loop, step, found)
    if result.loss > bound and loop.rank == 0:
        loop.workload.say(
            f"In step {step + 1:,} {found}: it is not left out, for the workers hold a part of the training state each."
        )
    _note(loop, result.loss)
    return result


def _note(loop: "TrainingLoop", loss: float) -> None:
    loop.position = replace(loop.position, loss=loop.position.loss.with_loss(loss))


def _tell(loop: "TrainingLoop", step: int, error: StepRefused) -> None:
    if loop.rank > 0:
        return
    first, number = loop.position.next_unit, loop.phase.units_per_step
    loop.post(StepSkipped(step + 1, first, number, str(error)))
    loop.workload.say(
        f"Step {step + 1:,} updates nothing: {error}, twice; its units ({first:,} to {first + number - 1:,}) are left "
        "out."
    )


def _end(loop: "TrainingLoop", step: int, error: StepRefused) -> UserError:
    """The error that ends the run, with the last good state on its way to the storage."""
    workload = loop.workload
    with suppress(Exception):
        if loop.engine.replicas is not None:
            loop.commit()
        workload.checkpoints.wait(FAREWELL_SECONDS)
    loop.engine.all_gather_floats([0.0])  # so that every rank names the same checkpoint
    first, steps = loop.position.next_unit, workload.checkpoints.steps()
    last = f"the last checkpoint is of step {steps[-1]:,}" if steps else "there is no checkpoint yet"
    key = "on-spike" if error.is_spike else "on-nonfinite"
    way_out = f", or leave such sequences out with --training.{key} skip"
    if loop.engine.replicas is None:  # where each worker holds a part of the state, they cannot be
        way_out = ""
    return UserError(
        f"In step {step + 1:,} (sequences {first:,} to {first + loop.phase.units_per_step - 1:,}) {error}; {last}: "
        f"start from one with a lower --optimizer.lr under another --name{way_out}."
    )
