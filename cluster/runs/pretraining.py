"""A pretraining run as its driver sees it: prepare the data beside it, run the workers, record, report."""

import json
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster.machines.connection import connect, resolve_seats
from cluster.runs.board import open_board
from cluster.runs.console import Console
from cluster.runs.recipe import Recipe, check_same_run
from cluster.runs.recorder import Recorder
from cluster.runs.summary import Summary, summarise
from doge.common.config_tree import flatten, from_dict, to_yaml
from doge.common.errors import UserError
from doge.common.lease import Lease
from doge.common.storage import Storage
from doge.model.configuration import check_same_function
from doge.reporting.tracking import Tracker

if TYPE_CHECKING:
    from cluster.machines.scaling import SeatRequest
    from data_pipelines.order.plan import Plan
    from doge.training.state.run_position import RunPosition


def pretrain(recipe: Recipe, start_from: str | None = None) -> Summary:
    """Train the recipe's model to its last step, going on where an earlier call with the same name stopped.

    Args:
        recipe: of the run.
        start_from: path or URI of a checkpoint to begin a new run with.

    Raises:
        UserError: bad input, said in one sentence.
    """
    recipe.check()
    run = Run(recipe, start_from)
    try:
        summary = run.finished() or run.execute()
    finally:
        run.console.close()
    summary.show(run.console)
    return summary


class Run:
    """One call of `pretrain`: the pieces around the worker group."""

    def __init__(self, recipe: Recipe, start_from: str | None):
        self.recipe, self.start_from = recipe, start_from
        self.storage = Storage(recipe.storage)
        self.directory = self.storage / f"runs/{recipe.name}"
        self.console = Console(recipe.training.max_steps, recipe.training.logging_steps)
        self._board: Any = None
        self._start: RunPosition | None = None  # where the checkpoint to start from stands

    def finished(self) -> Summary | None:
        """The summary of this very run, if it has been finished before."""
        started = self._started_recipe()
        if started is None:
            return None
        check_same_run(self.recipe, started)
        with suppress(FileNotFoundError):
            summary = from_dict(Summary, json.loads(self.directory.read_bytes("summary.json")))
            if summary.step >= self.recipe.training.max_steps:
                self.console.say(
                    f"The run {self.recipe.name} is finished; --name NEW starts another, a larger "
                    "--training.max-steps goes on with it."
                )
                return summary
        return None

    def execute(self) -> Summary:
        console, recipe = self.console, self.recipe
        console.say(f"Pretraining {recipe.name}")
        console.table(recipe.plan())
        self._check_start()
        connect(recipe.scaling)
        seats, use_gpu = resolve_seats(recipe.scaling)
        with Lease(self.directory, f"the training of {recipe.name}", on_lost=self._stop) as lease:
            plan = self._plan_data()
            tracker = Tracker(recipe.tracking, self.storage, self.directory, recipe.name)
            status = "FAILED"
            try:
                tracker.log_params(flatten(recipe))
                self.directory.write_bytes("recipe.yaml", to_yaml(recipe).encode())
                self.directory.write_bytes("data_plan", plan.fingerprint.encode())
                account = self._train(plan, tracker, seats, use_gpu, lease)
                summary = summarise(recipe, plan, self.storage, self.directory, tracker, console)
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                tracker.finish(status)
        console.say("")
        console.table(account)
        return summary

    def _stop(self, reason: str) -> None:
        """End the run for good, with a sentence."""
        import ray

        if self._board is not None:
            ray.get(self._board.stop.remote(reason))

    def _plan_data(self) -> "Plan":
        """List the data and make the tokenizer, which must fit the model; a run with a checkpoint keeps its plan."""
        from data_pipelines.order.plan import load_plan, make_plan
        from doge.tokenizer.loading import check_vocabulary

        recipe, started = self.recipe, self._started_recipe() if self._steps() else None
        if started and (started.data, started.tokenizer) == (recipe.data, recipe.tokenizer):
            with suppress(FileNotFoundError):
                return load_plan(self.storage, self.directory.read_bytes("data_plan").decode())
        plan = make_plan(recipe.data, recipe.tokenizer, self.storage, self.console.say)
        check_vocabulary(plan.open_tokenizer(self.storage), recipe.model.build().vocab_size)
        if self._start and (used := self._start.tokenizer) != plan.tokenizer_fingerprint:
            names = (n for n in self.storage.names("tokenizers") if n.endswith(".sha256"))
            same = [n for n in names if self.storage.read_bytes(f"tokenizers/{n}").decode() == used]
            path = self.storage.path(f"tokenizers/{same[0].removesuffix('.sha256')}") if same else "DIRECTORY"
            raise UserError(
                f"{self.start_from} was trained with another tokenizer, by which its weights read: "
                f"set --tokenizer.path {path}."
            )
        return plan

    def _train(
        self, plan: "Plan", tracker: Tracker, seats: "SeatRequest", use_gpu: bool, lease: Lease
    ) -> list[tuple[str, str]]:
        """Run the workers to the last step; the ledger's account of it, as labelled lines."""
        import ray
        import ray.train

        from cluster.elastic.coordinator import open_coordinator
        from cluster.elastic.seat import SeatConfig, take_seat
        from cluster.elastic.seat_trainer import SeatTrainer
        from cluster.elastic.workload import Job
        from cluster.machines.head_storage import share
        from cluster.runs.pretraining_phases import pretraining_settings

        recipe, board = self.recipe, open_board()
        self._board = board
        storage = share(self.storage)
        start_from = share(Storage(self.start_from)) if self.start_from else None
        job = Job(
            name=recipe.name,
            workload="cluster.workloads.training:TrainingWorkload",
            settings=pretraining_settings(recipe, plan, start_from),
            storage=storage,
            claim=lease.claim,
            board=board,
            use_gpu=use_gpu,
        )
        coordinator = open_coordinator(recipe.name, job, recipe.scaling)
        recorder = Recorder(recipe, board, self.storage, self.directory, tracker, self.console)
        preparation = threading.Thread(target=self._prepare, args=(plan, storage, board, recorder), daemon=True)
        attempt = f"{recipe.name}-{int(time.time())}"
        trainer = SeatTrainer(take_seat, SeatConfig(coordinator), seats, attempt, self.storage.path("ray_train"))
        with recorder:
            preparation.start()
            try:
                conducted = coordinator.conduct.remote()
                trainer.fit()
                ray.get(conducted)
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                last = str(error).strip().splitlines()[-1]
                ray.get(board.stop.remote(f"Ray ended the run ({last}): the same command goes on with it."))
            finally:
                recorder.over = True
                reason = ray.get(board.stopped.remote())
                ray.kill(coordinator)
            preparation.join(timeout=10)  # all that training needed is there
        if reason:
            raise UserError(reason)
        return recorder.report(recipe.training.max_steps)

    def _prepare(self, plan: "Plan", storage: Storage, board, recorder: "Recorder") -> None:
        """Make the shards that this run needs; a failure ends the run with its sentence."""
        from data_pipelines.prepare import prepare

        told = 0.0

        def tell(progress) -> None:
            nonlocal told
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self.console.say(f"Data {progress}")

        try:
            needed = self.recipe.training_sequences
            progress = prepare(plan, storage, needed, tell, should_stop=lambda: recorder.over)
            if progress.documents:
                self.console.say(f"Data {progress}")
        except Exception as error:
            import ray

            reason = str(error) if isinstance(error, UserError) else f"Preparing the data failed: {error!r}."
            ray.get(board.stop.remote(reason))

    def _steps(self) -> list[int]:
        """Steps of the run's checkpoints."""
        from doge.training.state.checkpoint import Checkpoints

        return Checkpoints(self.directory / "checkpoints").steps()

    def _started_recipe(self) -> Recipe | None:
        import yaml

        try:
            return from_dict(Recipe, yaml.safe_load(self.directory.read_bytes("recipe.yaml")))
        except FileNotFoundError:
            return None

    def _check_start(self) -> None:
        """Refuse, before anything starts, to go on or to begin from where this recipe cannot."""
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

        state, self._start = load_checkpoint(Storage(self.start_from))
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
