"""What the driver does with all that the workers tell: the console, MLflow, the recorded samples, the ledger."""

import json
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cluster.accounts.figures import Figures
from cluster.accounts.ledger import Ledger, StepRecord
from cluster.elastic.events import (
    Event,
    HostJoined,
    HostLeft,
    HostStarted,
    HostStarting,
    MembershipFormed,
    Message,
)
from cluster.runs.console import Console
from cluster.runs.forecast import remember_speeds
from cluster.runs.recipe import Recipe
from cluster.workloads.events import Evaluated, MemberStarted, MetricsMeasured, SamplesTaken, StepMade
from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError
from doge.common.words import count
from doge.reporting.tracking import Tracker

POLL_SECONDS = 0.25
WAIT_MESSAGE_SECONDS = 60
LEDGER_SECONDS = 30  # between two writes of the ledger
PATIENCE_SECONDS = 600  # with a storage that fails, once the training is over


class Recorder:
    """Takes the workers' posts from the board and deals with them: the console, MLflow, the recorded samples."""

    def __init__(self, recipe: Recipe, board, storage: Storage, directory: Storage, tracker: Tracker, console: Console):
        self.over = False
        self._recipe, self._storage = recipe, storage
        self._board, self._directory, self._tracker, self._console = board, directory, tracker, console
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._done = threading.Event()
        self._membership: MembershipFormed | None = None
        self._started: dict[int, MemberStarted] = {}  # its members, by rank
        self._ledger_written = time.monotonic()
        self.ledger = self._open_ledger()
        self.ledger.begin(time.monotonic())

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.ledger.close(time.monotonic())
        self._write_ledger()

    def report(self, step: int) -> list[tuple[str, str]]:
        """The ledger's figures as labelled lines, after they went to MLflow and the timeline was drawn."""
        from doge.reporting.plots import plot_lanes

        figures = self.ledger.figures(self._recipe.ledger)
        self._tracker.log_metrics([{"step": step} | figures.metrics()])
        self._remember_speeds(figures)
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder, "timeline.png")
            plot_lanes(plot, self._recipe.name, **self.ledger.timeline().drawing())
            self._directory.write_bytes("timeline.png", plot.read_bytes())
            self._tracker.log_artifact(plot)
        return [*figures.rows(), ("timeline", self._directory.path("timeline.png"))]

    def _remember_speeds(self, figures: Figures) -> None:
        """What a worker on each kind of device did while it computed, for the plan of the next run."""
        devices = {worker.device for worker in figures.workers}
        speeds = {}
        for device in devices:
            workers = [worker for worker in figures.workers if worker.device == device]
            seconds = sum(worker.seconds_of.get("step", 0.0) for worker in workers)
            if seconds > 0:
                speeds[device] = sum(worker.tokens for worker in workers) / seconds
        remember_speeds(self._recipe, self._storage, speeds)

    def _open_ledger(self) -> Ledger:
        """The run's ledger, which an earlier driver may have begun."""
        training, length = self._recipe.training, self._recipe.data.sequence_length
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a broken one is not worth a run
            ledger = Ledger.from_dict(json.loads(self._directory.read_bytes("ledger.json")))
            if ledger.tokens_per_step == training.global_batch_size * length:
                return ledger
        return Ledger(training.global_batch_size * length, length)

    def _write_ledger(self) -> None:
        self._ledger_written = time.monotonic()
        with suppress(UserError):  # the next time
            self._directory.write_bytes("ledger.json", json.dumps(self.ledger.to_dict()).encode())

    def _work(self) -> None:
        import ray

        shown = kept = 0
        started, told, failing_since, pause = time.monotonic(), False, None, 0.0
        while True:
            last = self._done.wait(POLL_SECONDS if failing_since is None else pause)
            if not (shown or told) and time.monotonic() - started > WAIT_MESSAGE_SECONDS:
                told = True
                self._console.say("Waiting for the cluster to have room for the workers, and for them to start.")
            posts = ray.get(self._board.take.remote(kept))
            try:
                self._show(posts[shown - kept :])
                shown = kept + len(posts)
                self._keep(posts)
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                if _may_pass(error) and not (last and time.monotonic() - failing_since > PATIENCE_SECONDS):
                    if not pause:
                        self._console.say(f"The run cannot be recorded now, training goes on meanwhile: {error}")
                    pause = min(2 * pause or 1.0, 30.0)
                    if last:
                        time.sleep(pause)  # the event is set and does not wait any more
                    continue
                # The run must not train on unrecorded, nor wait for a recorder that is gone.
                reason = str(error) if isinstance(error, UserError) else f"Recording the run failed: {error!r}."
                ray.get(self._board.stop.remote(reason, unrecorded=True))
                self._keep = lambda posts: None  # what follows a gap must not be recorded
                shown = kept + len(posts)
            if pause:
                self._console.say("The run is recorded again.")
            failing_since, pause = None, 0.0
            kept += len(posts)
            if last:
                break
        ray.get(self._board.take.remote(kept))

    def _show(self, events: list[Event]) -> None:
        """What a person sees, and the ledger: in memory, each event once."""
        for event in events:
            match event:
                case StepMade():
                    self._console.step(event.step, event.metrics)
                case Evaluated():
                    self._console.say(f"step {event.step:,}  held-out loss {event.metrics['held_out_loss']:.4f}")
                case Message():
                    self._console.say(event.text)
                case MembershipFormed():
                    self._membership, self._started = event, {}
                    self.ledger.membership(event.number, event.from_step, event.at)
                case MemberStarted():
                    self._tell_member(event)
                case HostStarting():
                    self.ledger.starting(event.host, event.replaces, event.at)
                case HostStarted():
                    self.ledger.started(event.host, event.at)
                case HostJoined():
                    self.ledger.joined(event.host, event.node, "", event.at)
                case HostLeft():
                    self.ledger.left(event.host, event.at)
                case StepRecord():
                    self.ledger.record(event)

    def _keep(self, events: list[Event]) -> None:
        """What must last: metrics and samples; doing it again changes nothing."""
        for event in events:
            if isinstance(event, SamplesTaken):
                self._write_samples(event.step, event.first, event.samples)
        rows = [{"step": event.step} | event.metrics for event in events if isinstance(event, MetricsMeasured)]
        self._tracker.log_metrics(rows)
        if time.monotonic() - self._ledger_written > LEDGER_SECONDS:
            self._write_ledger()

    def _write_samples(self, step: int, first: int, samples: list[tuple]) -> None:
        """One file a step and share, from sequence number to place; a repeated step writes the same again."""
        content = {first + at: sample for at, sample in enumerate(samples)}
        self._directory.write_bytes(f"samples/step-{step:08d}-{first:012d}.json", json.dumps(content).encode())

    def _tell_member(self, member: MemberStarted) -> None:
        """Once every member has made its first step, say who they are and what it took."""
        membership = self._membership
        if membership is None or member.membership != membership.number:
            return
        self._started[member.rank] = member
        if len(self._started) < membership.world_size:
            return
        members = [self._started[rank] for rank in range(len(self._started))]
        counted = Counter(m.device for m in members)
        devices = ", ".join(f"{number} × {device}" if number > 1 else device for device, number in counted.items())
        text = f"{count(len(members), 'worker')} on {devices}, {member.precision}"
        if len(members) > 1:
            text += f", sharing {' + '.join(str(m.share) for m in members)} sequences a step"
        text += f", from step {member.step:,}"
        if repeated := membership.reached - member.step:
            text += f", repeating {count(repeated, 'step')}"
        if membership.lost_s is not None:
            parts = {"regrouping": membership.lost_s + membership.formed_s}
            for name in members[0].seconds:
                parts[name] = max(m.seconds[name] for m in members)
            text += f", {sum(parts.values()):.1f} s after the last ("
            text += ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()) + ")"
        self._console.say(f"{text}.")


def _may_pass(error: Exception) -> bool:
    """Whether an error is the storage's or the tracking server's, and trying again may help."""
    packages = ("mlflow", "sqlalchemy", "sqlite3", "requests", "urllib3")
    return isinstance(error, StorageError | OSError) or type(error).__module__.split(".")[0] in packages
