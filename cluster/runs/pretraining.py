"""A pretraining run: the data prepared beside it, the model trained to its last step and exported."""

import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.machines.connection import connect, resolve_seats
from cluster.runs.board import BoardActor, BoardLost
from cluster.runs.console import Console
from cluster.runs.recipe import Recipe, check_same_run, redacted
from cluster.runs.run import Run, RunConfig
from cluster.runs.sinks.ledger_sink import TIMELINE
from cluster.runs.summary import Results, Summary, read_summary
from doge.common.config_tree import flatten, from_dict, parse_yaml, to_dict, to_yaml
from doge.common.errors import UserError
from doge.common.lease import Claim
from doge.common.storage import Storage
from doge.common.words import listed
from doge.model.configuration import check_same_function

if TYPE_CHECKING:
    from cluster.elastic.workload import Job
    from data_pipelines.order.plan import Plan
    from doge.training.state.run_position import RunPosition
    from doge.training.state.train_state import TrainState


def pretrain(recipe: Recipe, start_from: str | None = None) -> Summary:
    """Train the recipe's model to its last step, or resume where an earlier call with the same name stopped.

    Args:
        start_from: path or URI of a checkpoint to begin a new run with.

    Raises:
        UserError: bad input, said in one sentence; or the run is trained, and some of its results are missing.
    """
    recipe.check()
    pretraining = Pretraining(recipe, start_from)
    try:
        summary = pretraining.finished() or pretraining.complete() or pretraining.execute()
    finally:
        pretraining.console.close()
    summary.show(pretraining.console)
    missing = [*summary.missing, *(f"events for {sink}" for sink in pretraining.run.undelivered)]
    if missing:
        model = "" if "model" in summary.missing else f" The model is in {summary.model}."
        raise UserError(
            f"The run {recipe.name} is trained, but lacks its {listed(missing)}: run the same command again to make "
            f"what is missing.{model}"
        )
    return summary


def pretraining_job(
    recipe: Recipe, plan: "Plan", storage: Storage, claim: Claim, start_from: str | None, use_gpu: bool, board: Any
) -> "Job":
    """The job that the hosts of a pretraining run are sent.

    Args:
        storage: Root of everything durable, as every node opens it.
        start_from: Path or URI of a checkpoint to begin a new run with.
        board: Actor handle to which the hosts post.
    """
    from cluster.elastic.workload import Job
    from cluster.machines.head_storage import share
    from cluster.runs.pretraining_phases import pretraining_settings

    settings = pretraining_settings(recipe, plan, share(_open(start_from, recipe)) if start_from else None)
    return Job(
        name=recipe.name,
        workload="cluster.workloads.training_workload:TrainingWorkload",
        settings=replace(settings, recipe=to_dict(redacted(recipe))),
        storage=storage,
        claim=claim,
        board=board,
        use_gpu=use_gpu,
    )


class Pretraining:
    """One call of `pretrain`."""

    def __init__(self, recipe: Recipe, start_from: str | None):
        training, length = recipe.training, recipe.data.sequence_length
        self.recipe, self.start_from = recipe, start_from
        self.storage = _open(recipe.storage, recipe)
        self.console = Console(training.max_steps, training.logging_steps)
        config = RunConfig(
            name=recipe.name,
            storage=self.storage,
            scaling=recipe.scaling,
            tracking=recipe.tracking,
            ledger=recipe.ledger,
            parameters=flatten(redacted(recipe)),
            tokens_per_step=training.global_batch_size * length,
            tokens_per_unit=length,
        )
        self.run = Run(config, self.console)
        self._start: RunPosition | None = None  # where the checkpoint to start from stands

    def finished(self) -> Summary | None:
        """The summary of this very run, if all its results have been made before."""
        started = self._started_recipe()
        if started is None:
            return None
        check_same_run(redacted(self.recipe), started)
        summary = read_summary(self.recipe, self.storage, self.run.directory)
        if summary is None or summary.missing or summary.step < self.recipe.training.max_steps:
            return None
        self.console.say(
            f"The run {self.recipe.name} is finished: choose another --name for a new run, or raise "
            "--training.max-steps to continue this one."
        )
        self.run.deliver_rest()
        return summary

    def complete(self) -> Summary | None:
        """Make the results that are missing of a run whose last step is made, without workers; None where it is not."""
        from data_pipelines.order.plan import load_plan

        if self._steps()[-1:] != [self.recipe.training.max_steps]:
            return None
        with self.run.claim():
            checkpoint = self._last_checkpoint()
            if checkpoint is None or checkpoint[0].step != self.recipe.training.max_steps:
                return None
            try:
                plan = load_plan(self.storage, self.run.directory.read_bytes("data_plan").decode())
            except FileNotFoundError:
                return None
            self.console.say(f"The run {self.recipe.name} is trained: making the results that it lacks.")
            with self.run.record(at_work=False):
                return self._make_results(plan, checkpoint)

    def execute(self) -> Summary:
        """Train to the last step; raises UserError where that cannot be done."""
        console, recipe, run = self.console, self.recipe, self.run
        console.say(f"Pretraining {recipe.name}")
        console.table(recipe.plan())
        self._check_start()
        connect(recipe.scaling)
        seats, use_gpu = resolve_seats(recipe.scaling, recipe.training.global_batch_size)
        from cluster.machines.head_storage import share

        storage = share(self.storage)
        with run.claim(storage) as claim:
            plan = self._plan_data()
            with run.record():
                run.directory.write_bytes("recipe.yaml", to_yaml(redacted(recipe)).encode())
                run.directory.write_bytes("data_plan", plan.fingerprint.encode())
                try:
                    run.work(
                        lambda board: pretraining_job(recipe, plan, storage, claim, self.start_from, use_gpu, board),
                        seats,
                        lambda board, over: self._prepare(plan, storage, board, over),
                    )
                except BoardLost as lost:
                    raise UserError(f"{lost} from step {max(self._steps(), default=0):,}.") from lost
                checkpoint = self._last_checkpoint()
                if checkpoint is None:
                    raise UserError(
                        f"{run.directory.path('checkpoints')} holds no whole checkpoint any more: run the same command "
                        "again."
                    )
                return self._make_results(plan, checkpoint)

    def _last_checkpoint(self) -> "tuple[TrainState, RunPosition] | None":
        from doge.training.state.checkpoint import Checkpoints

        return Checkpoints(self.run.directory / "checkpoints").latest()

    def _make_results(self, plan: "Plan", checkpoint: "tuple[TrainState, RunPosition]") -> Summary:
        results = Results(self.recipe, plan, self.storage, self.run, checkpoint)
        summary = results.make()
        if results.figures is not None:
            self.console.say("")
            timeline = ("timeline", self.run.directory.path(TIMELINE))
            self.console.table([*results.figures.rows(), timeline])
        return summary

    def _plan_data(self) -> "Plan":
        """List the data and train or open the tokenizer; a run that has a checkpoint keeps its plan."""
        from data_pipelines.order.plan import load_plan, make_plan
        from doge.tokenizer.loading import check_vocabulary

        recipe, started = self.recipe, self._started_recipe() if self._steps() else None
        shown = redacted(recipe)
        if started and (started.data, started.tokenizer) == (shown.data, shown.tokenizer):
            with suppress(FileNotFoundError):
                return load_plan(self.storage, self.run.directory.read_bytes("data_plan").decode())
        plan = make_plan(recipe.data, recipe.tokenizer, self.storage, self.console.say)
        check_vocabulary(plan.open_tokenizer(self.storage), recipe.model.build().vocab_size)
        if self._start and (used := self._start.tokenizer) != plan.tokenizer_fingerprint:
            names = (n for n in self.storage.names("tokenizers") if n.endswith(".sha256"))
            same = [n for n in names if self.storage.read_bytes(f"tokenizers/{n}").decode() == used]
            path = self.storage.path(f"tokenizers/{same[0].removesuffix('.sha256')}") if same else "DIRECTORY"
            raise UserError(f"{self.start_from} was trained with another tokenizer: set --tokenizer.path {path}.")
        return plan

    def _prepare(self, plan: "Plan", storage: Storage, board: BoardActor, over: threading.Event) -> None:
        """Prepare the shards that this run needs; a failure stops the run."""
        from data_pipelines.prepare import prepare

        told = 0.0

        def tell(progress: object) -> None:
            nonlocal told
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self.console.say(f"Data {progress}")

        try:
            progress = prepare(plan, storage, self.recipe.training_sequences, tell, should_stop=over.is_set)
            if progress.documents:
                self.console.say(f"Data {progress}")
        except Exception as error:
            if over.is_set():  # Ray may be shut down by now
                return
            board.stop(str(error) if isinstance(error, UserError) else f"Preparing the data failed: {error!r}.")

    def _steps(self) -> list[int]:
        """Steps of the run's checkpoints."""
        from doge.training.state.checkpoint import Checkpoints

        return Checkpoints(self.run.directory / "checkpoints").steps()

    def _started_recipe(self) -> Recipe | None:
        """The recipe that the run was started with, without secrets."""
        directory = self.run.directory
        try:
            text = directory.read_bytes("recipe.yaml").decode()
        except FileNotFoundError:
            return None
        where = directory.path("recipe.yaml")
        try:
            return from_dict(Recipe, parse_yaml(text, where), where)
        except UserError as error:
            raise UserError(
                f"The run {self.recipe.name} was started by another version of this project, or its recipe was edited "
                f"({str(error).removesuffix('.')}): resume it with that version, or choose another --name."
            ) from error

    def _check_start(self) -> None:
        """Raise UserError early if this recipe cannot resume its run or begin from the checkpoint."""
        if steps := self._steps():
            if steps[-1] > self.recipe.training.max_steps:
                raise UserError(
                    f"The run {self.recipe.name} is at step {steps[-1]:,} already, beyond training.max_steps "
                    f"({self.recipe.training.max_steps:,}): raise it, or choose another --name."
                )
            return  # the run has begun: its own checkpoints count
        if self.start_from is None:
            return
        from doge.model.modeling import build_model
        from doge.training.state.checkpoint import load_checkpoint
        from doge.training.state.train_state import check_fits

        given = _open(self.start_from, self.recipe)
        if checkpoints := given.names("checkpoints"):
            raise UserError(
                f"{self.start_from} is the directory of a run: give one of its checkpoints, such as "
                f"{given.path(f'checkpoints/{checkpoints[-1]}')}."
            )
        state, self._start = load_checkpoint(given)
        check_fits(state, build_model(self.recipe.model.build()))
        check_same_function(self.recipe.model, from_dict(Recipe, self._start.recipe).model)
        training, schedule = self.recipe.training, self.recipe.lr_scheduler
        if state.step >= training.max_steps:
            raise UserError(
                f"{self.start_from} is at step {state.step}, not before training.max_steps ({training.max_steps}): "
                "set --training.max-steps to where the new run shall end."
            )
        if schedule.is_stable(state.step, training.max_steps):
            self.console.say(f"Starting from step {state.step}, in the stable phase.")
        else:
            self.console.say(f"Starting from step {state.step}, outside the stable phase of this recipe's schedule.")


def _open(root: str, recipe: Recipe) -> Storage:
    return Storage(root, cache_bytes=recipe.cache_bytes)
