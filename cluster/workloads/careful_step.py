"""A step whose loss or gradient may be no number: tried twice, then left out or the end of the run."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from cluster.workloads.training_events import StepSkipped
from doge.common.errors import UserError
from doge.training.step_result import NotFinite, StepResult

if TYPE_CHECKING:
    from cluster.workloads.training_loop import TrainingLoop

FAREWELL_SECONDS = 60  # for the last good state to be written before a run that failed ends


def careful_step(loop: "TrainingLoop", step: int, make: Callable[[], StepResult]) -> StepResult | None:
    """Make a step; None where its units are left out, since they gave no number twice.

    All ranks come to the same end, for they see the same loss and norm.

    Args:
        step: updates made before it.

    Raises:
        UserError: there is no number, and the recipe asks to stop there.
    """
    try:
        result = make()
    except NotFinite as error:
        if loop.rank == 0:
            loop.workload.say(f"In step {step + 1:,} {error}: the step is tried once more.")
        try:
            return make()
        except NotFinite as again:
            if loop.settings.on_nonfinite == "stop":
                raise _end(loop, step, again.loss, again.grad_norm) from None
            loop.engine.skip()
            _tell(loop, step, again)
            return None
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise _end(loop, step, result.loss, result.grad_norm)
    return result


def _tell(loop: "TrainingLoop", step: int, error: NotFinite) -> None:
    if loop.rank > 0:
        return
    first, number = loop.position.next_unit, loop.phase.units_per_step
    loop.post(StepSkipped(step + 1, first, number, str(error)))
    loop.workload.say(
        f"Step {step + 1:,} updates nothing: {error}, twice; its units ({first:,} to {first + number - 1:,}) are left "
        "out."
    )


def _end(loop: "TrainingLoop", step: int, loss: float, grad_norm: float) -> UserError:
    """The error that ends the run, with the last good state on its way to the storage."""
    workload = loop.workload
    with suppress(Exception):
        if loop.engine.replicas is not None:
            loop.commit()
        workload.checkpoints.wait(FAREWELL_SECONDS)
    loop.engine.all_gather_floats([0.0])  # so that every rank names the same checkpoint
    first, steps = loop.position.next_unit, workload.checkpoints.steps()
    last = f"the last checkpoint is of step {steps[-1]:,}" if steps else "there is no checkpoint yet"
    return UserError(
        f"In step {step + 1:,} (sequences {first:,} to {first + loop.phase.units_per_step - 1:,}) the loss was {loss} "
        f"and the gradient norm {grad_norm}; {last}: start from one with a lower --optimizer.lr under another --name, "
        "or leave such sequences out with --training.on-nonfinite skip."
    )
