"""A pretraining run as its driver sees it: prepare the data beside it, run the workers, record, report."""

import json
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster.board import Post, open_board
from cluster.connection import connect, resolve_workers
from cluster.console import Console
from cluster.recipe import Recipe, check_same_run
from cluster.summary import Summary, summarise
from doge.configuration import check_same_function
from doge.errors import UserError
from doge.recipe import flatten, from_dict, to_yaml
from doge.storage import Storage
from doge.tracking import Tracker

if TYPE_CHECKING:
    from data_pipelines.plan import Plan

POLL_SECONDS = 0.25
WAIT_MESSAGE_SECONDS = 60
# A worker's step runs in a thread of its own, from whose arenas glibc returns large buffers to the kernel only to ask
# for them again, page by page: a fifth of a CPU step. These keep them.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
}


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
        self._start: dict[str, Any] | None = None  # what the checkpoint to start from remembers

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
        num_workers, use_gpu = resolve_workers(recipe.scaling)
        recipe.check_workers(num_workers)
        plan = self._plan_data()
        tracker = Tracker(recipe.tracking, self.storage, self.directory, recipe.name)
        status = "FAILED"
        try:
            tracker.log_params(flatten(recipe))
            self.directory.write_bytes("recipe.yaml", to_yaml(recipe).encode())
            self.directory.write_bytes("data_plan", plan.fingerprint.encode())
            self._train(plan, tracker, num_workers, use_gpu)
            summary = summarise(recipe, plan, self.storage, self.directory, tracker, console)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)
        return summary

    def _plan_data(self) -> "Plan":
        """List the data and make the tokenizer, which must fit the model; a run with a checkpoint keeps its plan."""
        from data_pipelines.plan import load_plan, make_plan
        from doge.tokenizer import check_vocabulary

        recipe, started = self.recipe, self._started_recipe() if self._steps() else None
        if started and (started.data, started.tokenizer) == (recipe.data, recipe.tokenizer):
            with suppress(FileNotFoundError):
                return load_plan(self.storage, self.directory.read_bytes("data_plan").decode())
        plan = make_plan(recipe.data, recipe.tokenizer, self.storage, self.console.say)
        check_vocabulary(plan.open_tokenizer(self.storage), recipe.model.build().vocab_size)
        if self._start and (used := self._start["position"]["tokenizer"]) != plan.tokenizer_fingerprint:
            names = (n for n in self.storage.names("tokenizers") if n.endswith(".sha256"))
            same = [n for n in names if self.storage.read_bytes(f"tokenizers/{n}").decode() == used]
            path = self.storage.path(f"tokenizers/{same[0].removesuffix('.sha256')}") if same else "DIRECTORY"
            raise UserError(
                f"{self.start_from} was trained with another tokenizer, by which its weights read: "
                f"set --tokenizer.path {path}."
            )
        return plan

    def _train(self, plan: "Plan", tracker: Tracker, num_workers: int, use_gpu: bool) -> None:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from cluster.worker import WorkerConfig, train

        board = open_board()
        recorder = Recorder(board, self.directory, tracker, self.console)
        preparation = threading.Thread(target=self._prepare, args=(plan, board, recorder), daemon=True)
        trainer = TorchTrainer(
            train,
            train_loop_config=WorkerConfig(self.recipe, plan.fingerprint, self.start_from, board),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": self.recipe.scaling.num_cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name=f"{self.recipe.name}-{int(time.time())}",
                storage_path=self.storage.path("ray_train"),
                failure_config=FailureConfig(max_failures=self.recipe.scaling.max_failures),
                worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            ),
        )
        failure: Exception | None = None
        interrupt = signal.getsignal(signal.SIGINT)
        with recorder:
            preparation.start()
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                failure = error
            except SystemExit:  # how Ray Train ends an interrupted run
                raise KeyboardInterrupt from None
            finally:
                signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves its own handler behind
                reason = ray.get(board.stopped.remote())
                recorder.over = True
            preparation.join(timeout=10)  # all that training needed is there
        if reason:
            raise UserError(reason)
        if failure is not None:
            last = str(failure).strip().splitlines()[-1]
            raise UserError(
                f"The run failed more than scaling.max_failures = {self.recipe.scaling.max_failures} times ({last}): "
                "the same command goes on from the last checkpoint."
            ) from failure

    def _prepare(self, plan: "Plan", board, recorder: "Recorder") -> None:
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
            progress = prepare(plan, self.storage, needed, tell, should_stop=lambda: recorder.over)
            if progress.documents:
                self.console.say(f"Data {progress}")
        except Exception as error:
            import ray

            reason = str(error) if isinstance(error, UserError) else f"Preparing the data failed: {error!r}."
            ray.get(board.stop.remote(reason))

    def _steps(self) -> list[int]:
        """Steps of the run's checkpoints."""
        from doge.checkpoint import Checkpoints

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
        from doge.checkpoint import load_checkpoint
        from doge.engine import check_fits
        from doge.modeling import build_model

        state, self._start = load_checkpoint(Storage(self.start_from))
        check_fits(state, build_model(self.recipe.model.build()))
        check_same_function(self.recipe.model, from_dict(Recipe, self._start["recipe"]).model)
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


class Recorder:
    """Takes the workers' posts from the board and deals with them: the console, MLflow, the recorded samples."""

    def __init__(self, board, directory: Storage, tracker: Tracker, console: Console):
        self.over = False
        self._board, self._directory, self._tracker, self._console = board, directory, tracker, console
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._done = threading.Event()
        self._memberships: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        import ray

        handled, last, started, told = 0, False, time.monotonic(), False
        while not last:
            last = self._done.wait(POLL_SECONDS)
            if not (handled or told) and time.monotonic() - started > WAIT_MESSAGE_SECONDS:
                told = True
                self._console.say("Waiting for the cluster to have room for the workers, and for them to start.")
            posts = ray.get(self._board.take.remote(handled))
            try:
                self._handle(posts)
            except Exception as error:  # the run must not train on unrecorded, nor wait for a recorder that is gone
                reason = str(error) if isinstance(error, UserError) else f"Recording the run failed: {error!r}."
                ray.get(self._board.stop.remote(reason, unrecorded=True))
                self._handle = lambda posts: None  # what follows a gap must not be recorded
            handled += len(posts)
        ray.get(self._board.take.remote(handled))

    def _handle(self, posts: list[Post]) -> None:
        rows = []
        for post in posts:
            if post.kind in ("step", "evaluation", "experts"):
                rows.append({k: v for k, v in post.content.items() if k != "held_out_tokens"})
            if post.kind == "step":
                self._console.step(post.content)
            elif post.kind == "evaluation":
                self._console.say(f"step {post.content['step']:,}  held-out loss {post.content['held_out_loss']:.4f}")
            elif post.kind == "samples":
                self._write_samples(*post.content)
            elif post.kind == "membership":
                self._tell_membership(post.content)
            elif post.kind == "message":
                self._console.say(post.content)
        self._tracker.log_metrics(rows)

    def _write_samples(self, step: int, first: int, samples: list[tuple]) -> None:
        """One file a step and share, from sequence number to place; a repeated step writes the same again."""
        content = {first + at: sample for at, sample in enumerate(samples)}
        self._directory.write_bytes(f"samples/step-{step:08d}-{first:012d}.json", json.dumps(content).encode())

    def _tell_membership(self, member: dict[str, Any]) -> None:
        self._memberships[member["rank"]] = member
        if len(self._memberships) == member["world_size"]:
            devices = ", ".join(sorted({m["device"] for m in self._memberships.values()}))
            self._memberships.clear()
            self._console.say(
                f"{member['world_size']} worker{'s' * (member['world_size'] > 1)} on {devices}, {member['precision']}, "
                f"from step {member['step']:,}."
            )
