"""A run of any workload as its driver sees it: one driver at a time, everything recorded, workers until it is done."""

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.accounts.figures import Figures
from cluster.accounts.ledger import DriverStarted, LedgerRecipe, WorkEnded
from cluster.elastic.events import Event
from cluster.machines.scaling import ScalingRecipe, SeatRequest
from cluster.runs.board import BoardActor, why_ray_ended
from cluster.runs.collector import Collector
from cluster.runs.console import Console
from cluster.runs.journal import Journal, journal_directory
from cluster.runs.run_events import FileWritten, RunEnded, Status
from cluster.runs.sinks.console_sink import ConsoleSink
from cluster.runs.sinks.curves_sink import CurvesSink
from cluster.runs.sinks.delivery import Delivery
from cluster.runs.sinks.ledger_sink import LedgerSink
from cluster.runs.sinks.samples_sink import SamplesSink
from cluster.runs.sinks.tracking_sink import TrackingSink
from cluster.workloads.training_events import MetricsMeasured
from doge.common.errors import UserError
from doge.common.lease import Claim, Lease
from doge.common.storage import Storage
from doge.reporting.tracking import Tracker, TrackingBusy, TrackingRecipe, database_path, tracking_uri

if TYPE_CHECKING:
    from cluster.elastic.workload import Job

OPENING_SECONDS = 15.0  # for MLflow to open before the run begins without it; a new database takes long
SERVER_SECONDS = 9.0  # the same for a server
REPORT_SECONDS = 30.0  # for the ledger to take in the last events
COMMIT_SECONDS = 25.0  # for the workers to commit once a user interrupted the run, or its machine is about to go
INTERRUPTED_SECONDS = 5.0  # for every sink once a user interrupted the run


@dataclass(frozen=True)
class RunConfig:
    """The part of a run's recipe that does not depend on what its workers do.

    Args:
        name: Name of the run and of its directory.
        storage: Root of everything durable.
        parameters: Parameters to show in MLflow, by dotted name.
        tokens_per_step: Tokens of a global batch.
        tokens_per_unit: Tokens of a sequence.
    """

    name: str
    storage: Storage
    scaling: ScalingRecipe
    tracking: TrackingRecipe
    ledger: LedgerRecipe
    parameters: Mapping[str, Any]
    tokens_per_step: int
    tokens_per_unit: int


class Run:
    """One driver's call of a run: `claim` it, then `record` what happens, and let the workers `work` meanwhile."""

    def __init__(self, config: RunConfig, console: Console):
        self.config, self.console = config, console
        self.directory = config.storage / f"runs/{config.name}"
        self._ledger = LedgerSink(self.directory, config.ledger, config.tokens_per_step, config.tokens_per_unit)
        self._curves = CurvesSink(self.directory)
        self._tracking = TrackingSink(self._open_tracker, self.directory)
        self._samples = SamplesSink(self.directory)
        self.undelivered: dict[str, str] = {}
        """What the last delivery has left out: by the name of the sink, a sentence."""
        self.journal: Journal | None = None
        self._delivery: Delivery | None = None
        self._board: BoardActor | None = None

    @contextmanager
    def claim(self, storage: Storage | None = None) -> Iterator[Claim]:
        """Be the run's only driver. Raises UserError where another one lives.

        Args:
            storage: root of everything durable, as workers on any node open it who check the claim; by default only
                this process may.
        """
        directory = (storage or self.config.storage) / f"runs/{self.config.name}"
        with Lease(directory, f"the training of {self.config.name}", on_lost=self._stop) as lease:
            yield lease.claim

    @contextmanager
    def record(self, at_work: bool = True) -> Iterator[None]:
        """Record events, and deliver them to all sinks; at the end, say what could not be delivered.

        Args:
            at_work: whether workers follow, for whom MLflow must be usable; else something is added to a trained run.

        Raises:
            UserError: the journal cannot be written, or MLflow cannot be used with these settings.
        """
        journal = self._open_journal()
        sinks = [ConsoleSink(self.console), self._ledger, self._curves, self._samples, self._tracking]
        delivery = self._delivery = Delivery(journal, sinks, self.console.say)
        if at_work:
            parameters = {name: str(value) for name, value in self.config.parameters.items()}
            self.post(DriverStarted(time.monotonic(), parameters))
        delivery.start()
        if at_work:
            try:
                self._check_tracking(delivery)
            except UserError:
                self.post(RunEnded("FAILED"))
                delivery.close(0.0)
                raise
        status: Status = "FAILED"
        patience: float | None = None
        try:
            yield
            status = "FINISHED"
        except KeyboardInterrupt:
            status, patience = "KILLED", INTERRUPTED_SECONDS
            raise
        finally:
            with suppress(UserError):  # the disk is full: this has been said
                self.post(RunEnded(status))
            self._end_delivery(delivery, patience)

    def post(self, event: Event) -> None:
        """Add an event of the driver's own. Raises UserError where the journal cannot be written."""
        assert self.journal is not None, "a run posts while it is recorded"
        try:
            self.journal.append([event])
        except OSError as error:
            raise _unusable(self.journal, error) from error

    def work(
        self,
        make_job: Callable[[Any], "Job"],
        seats: SeatRequest,
        beside: Callable[[BoardActor, threading.Event], None],
    ) -> None:
        """Keep hosts at work in the seats until the job is done.

        Args:
            make_job: gives the job, from the handle of the board to which its hosts post.
            beside: is called in a thread of its own, and returns soon after the event is set.

        Raises:
            BoardLost: what the hosts tell cannot be gathered any more, so that nothing can be committed.
            UserError: the run was stopped, with the reason.
        """
        import ray
        import ray.train

        from cluster.elastic.coordinator import open_coordinator
        from cluster.elastic.seat import take_seat
        from cluster.elastic.seat_trainer import SeatTrainer

        assert self.journal is not None, "a run works while it is recorded"
        name, storage = self.config.name, self.config.storage
        board = self._board = BoardActor()
        job = make_job(board.handle)  # held until the end: what it shares lasts as long as it is referenced here
        coordinator = open_coordinator(name, job, self.config.scaling)
        attempt = f"{name}-{uuid.uuid4().hex[:8]}"
        trainer = SeatTrainer(take_seat, coordinator, seats, attempt, storage.path("ray_train"))
        over = threading.Event()
        helper = threading.Thread(target=beside, args=(board, over), daemon=True)
        collector = Collector(board, self.journal, self.console.say)
        try:
            with collector:
                helper.start()
                try:
                    conducted = coordinator.conduct.remote()
                    with interrupted_by_sigterm():
                        trainer.fit()
                        ray.get(conducted)
                except KeyboardInterrupt:
                    self._commit_before_the_end(coordinator)
                    raise
                except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                    board.stop(f"{why_ray_ended('a process of the run', error)}.")
                finally:
                    over.set()
                    ray.kill(coordinator)
                helper.join(timeout=10)  # all that the workers needed is there
            if collector.lost is not None:
                raise collector.lost
            if stopped := board.stopped():
                raise UserError(stopped)
        finally:
            with suppress(UserError):  # a journal that cannot be written is a reason of its own
                self.post(WorkEnded(time.monotonic()))
            self._board = None
            board.close()

    def _commit_before_the_end(self, coordinator: Any) -> None:
        """Let the workers commit what they have, for a while; a second interruption ends that."""
        import ray

        self.console.say(
            f"Interrupted: committing the last step, for at most {COMMIT_SECONDS:g} s (interrupt again to end at once)."
        )
        try:
            with interrupted_by_sigterm():
                ray.get(coordinator.interrupt.remote(), timeout=COMMIT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            self.console.say("The last step could not be committed in time: the checkpoint before it is kept.")
        except (KeyboardInterrupt, ray.exceptions.RayError):
            self.console.say("The last step is not committed: the checkpoint before it is kept.")

    def catch_up(self) -> None:
        """Let the ledger and the curves take in all events so far, unless that takes too long."""
        assert self._delivery is not None, "a run catches up while it is recorded"
        self._delivery.catch_up([self._ledger, self._curves], REPORT_SECONDS)

    def report(self, step: int) -> Figures:
        """Record the run's figures at ``step`` and its timeline, and return the figures."""
        figures = self._ledger.figures()
        self.post(MetricsMeasured(step, figures.metrics()))
        self.post(FileWritten(self._ledger.draw_timeline(self.config.name)))
        return figures

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """``(step, value)`` of ``loss`` or ``held_out_loss``, as far as it is known after `catch_up`."""
        return self._curves.curve(metric)

    def deliver_rest(self) -> None:
        """Deliver what an earlier driver had to leave behind, if anything."""
        journal, sinks = self._open_journal(), [self._ledger, self._curves, self._samples, self._tracking]
        if all(sink.position(journal) >= journal.end for sink in sinks):
            return
        self.console.say("Recording what could not be recorded before.")
        with self.claim():
            delivery = Delivery(self._open_journal(), sinks, self.console.say)
            delivery.start()
            tracking = delivery.thread(self._tracking)
            tracking.wait(lambda t: t.position >= journal.end or t.error is not None, OPENING_SECONDS)
            self._end_delivery(delivery, 0.0 if _is_unusable(tracking.error) else None)

    def _end_delivery(self, delivery: Delivery, seconds: float | None) -> None:
        """Deliver what is left, and say what could not be."""
        self.undelivered = delivery.close(seconds)
        for sentence in self.undelivered.values():
            self.console.say(sentence)

    def _open_journal(self) -> Journal:
        directory = journal_directory(self.directory)
        try:
            self.journal = Journal(directory)
        except OSError as error:
            raise UserError(f"The run's journal {directory} cannot be read ({error.strerror or error}).") from error
        return self.journal

    def _open_tracker(self) -> Tracker:
        return Tracker(self.config.tracking, self.config.storage, self.directory, self.config.name)

    def _check_tracking(self, delivery: Delivery) -> None:
        """Raise UserError where MLflow answers soon that it cannot be used; one that is slow catches up later."""
        assert self.journal is not None, "MLflow is checked while the run is recorded"
        thread, begun = delivery.thread(self._tracking), self.journal.end
        uri = tracking_uri(self.config.tracking, self.config.storage)
        seconds = OPENING_SECONDS if database_path(uri) else min(SERVER_SECONDS, OPENING_SECONDS)
        thread.wait(lambda t: t.position >= begun or t.error is not None, seconds)
        if thread.error is not None and _is_unusable(thread.error):
            raise thread.error
        if thread.position < begun:
            thread.note_lag(f"MLflow at {uri} has not answered for {seconds:g} s.")

    def _stop(self, reason: str) -> None:
        """End the run for good, with a sentence."""
        if self._board is not None:
            self._board.stop(reason)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which job managers and machines that go announce themselves, be a KeyboardInterrupt inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_unusable(error: Exception | None) -> bool:
    """Whether MLflow, which gave this error, will hardly be usable in a while without the user."""
    return isinstance(error, UserError) and not isinstance(error, TrackingBusy)


def _unusable(journal: Journal, error: OSError) -> UserError:
    return UserError(
        f"The run cannot be recorded in {journal.directory} ({error.strerror or error}): make room there, or choose a "
        "storage that you may write."
    )
