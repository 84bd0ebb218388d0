"""A training as a tuple of phases: what each learns, from which units, for how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol

from data_pipelines.order.feed import FeedConfig
from doge.common.storage import Storage
from doge.training.engine_recipe import EngineRecipe
from doge.training.objective import Objective
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe
from doge.training.state.run_position import RunningMean, RunPosition

if TYPE_CHECKING:
    from cluster.workloads.training_loop import TrainingLoop


class SideTask(Protocol):
    """Something that all members do together between two steps, such as an evaluation."""

    @property
    def kind(self) -> str:
        """What the ledger books its time as."""

    def due(self, step: int, last: bool) -> bool:
        """Whether it is done after ``step`` updates; ``last`` is the last step of the phase."""

    def run(self, loop: "TrainingLoop") -> None:
        """Do it, on every rank."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with one objective and one feed.

    Args:
        name: what a reader calls it.
        objective: what is learnt, and which parameters of it.
        feed: where the units come from; a phase begins with its unit 0.
        steps: updates.
        units_per_step: units of every step, whatever the number of workers.
        unit_tokens: tokens of one unit, the most it may have: for rates, and for the micro-batch that fits.
        optimizer: its recipe.
        lr_scheduler: over the steps of this phase.
        side_tasks: done between two steps.
    """

    name: str
    objective: Objective
    feed: FeedConfig
    steps: int
    units_per_step: int
    unit_tokens: int
    optimizer: OptimizerRecipe
    lr_scheduler: SchedulerRecipe
    side_tasks: tuple[SideTask, ...] = ()


@dataclass(frozen=True)
class TrainingSettings:
    """What a host must know to train.

    Args:
        phases: in their order.
        engine: ZeRO stage and precision.
        tokenizer: fingerprint of the tokenizer.
        recipe: the resolved recipe, which every checkpoint remembers.
        seed: seed of whatever is drawn for a unit.
        save_steps: steps between two checkpoints, at most.
        save_seconds: seconds between two, at most; None is no bound.
        save_total_limit: checkpoints that are kept, the newest.
        logging_steps: steps between two statistics of the experts.
        micro_batch_size: most units that a worker takes at once; None is what fits.
        record_samples: whether to write down which unit lies where.
        shares: whether a worker's share of a step follows its speed.
        peak_tflops: a worker's peak, for the model FLOPs utilisation; None is looked up.
        profile_steps: steps that the first worker traces.
        start_from: checkpoint of another run to begin with.
        on_nonfinite: what follows a step whose loss or gradient is no number, twice.
        on_spike: what follows one whose loss is beyond the bound, twice.
        spike_factor: the bound, as a multiple of the mean loss of the latest steps.
    """

    phases: tuple[Phase, ...]
    engine: EngineRecipe
    tokenizer: str
    recipe: dict[str, Any]
    seed: int = 0
    save_steps: int = 200
    save_seconds: float | None = None
    save_total_limit: int = 2
    logging_steps: int = 10
    micro_batch_size: int | None = None
    record_samples: bool = False
    shares: Literal["measured", "equal"] = "measured"
    peak_tflops: float | None = None
    profile_steps: int = 0
    start_from: Storage | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_spike: Literal["off", "stop", "skip"] = "off"
    spike_factor: float = 2.0

    @property
    def max_steps(self) -> int:
        """Updates of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def bounds(self, phase: int) -> tuple[int, int]:
        """Updates made before and after the phase with this index."""
        ends = list(accumulate((phase.steps for phase in self.phases), initial=0))
        return ends[phase], ends[phase + 1]

    def next_phase(self, position: RunPosition) -> RunPosition:
        """Where the next phase begins; the same position in the last one."""
        after = position.phase + 1
        if after == len(self.phases):
            return position
        return replace(position, phase=after, next_unit=0, feed=self.phases[after].feed.fingerprint, loss=RunningMean())

    def position_to_commit(self, position: RunPosition, step: int) -> RunPosition:
        """What a checkpoint after ``step`` updates remembers: where the next one is made, and the recipe."""
        position = replace(position, recipe=self.recipe)
        return self.next_phase(position) if step == self.bounds(position.phase)[1] else position

    def phase_at(self, step: int) -> int:
        """Index of the phase of the update after ``step``, the last one beyond the end."""
        return next((at for at in range(len(self.phases)) if step < self.bounds(at)[1]), len(self.phases) - 1)


def due_tasks(tasks: Sequence[SideTask], step: int, last: bool) -> list[SideTask]:
    """The tasks to do after ``step`` updates, in their order."""
    return [task for task in tasks if task.due(step, last)]
