"""Where a run may have its workers: seats that Ray Train holds, and moves when nodes arrive, drain or die.

Ray Train's own elastic policy asks its autoscaling coordinator, whose picture of the cluster is up to 20 s old, and
waits for a placement group on a node that is gone. The policy here asks the cluster itself, each time anew.

This file builds on private interfaces of Ray Train V2: checked with Ray 2.60.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.machines.nodes import describe_cluster, look
from cluster.machines.scaling import SeatRequest
from doge.common.errors import UserError
from doge.common.words import count

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # between two looks at the seats
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # then the cluster is looked at anew
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would hold the seats on a draining node until its deadline
}
LOST = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
SILENT_SECONDS = 5.0  # that a running group's node may leave a probe without an answer
WAIT_SECONDS = 0.25  # between two looks at a cluster without room


class HeldSeats(WorkerGroupCallback):
    """Knows the worker group that holds resources now. It lives in the controller's process, as `SeatPolicy` does."""

    state: WorkerGroupState | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if HeldSeats.state is not None:  # Ray leaves a group behind that fails late in its start
            HeldSeats.state.shutdown()
            HeldSeats.state = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        HeldSeats.state = worker_group.get_worker_group_state()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        for worker in worker_group.get_workers():  # a farewell to a worker of a dead node takes 5 s
            ray.kill(worker.actor)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        HeldSeats.state = None

    after_worker_group_abort = after_worker_group_shutdown

    @staticmethod
    def by_node() -> dict[str, int]:
        """Seats by node id."""
        held: dict[str, int] = {}
        for worker in HeldSeats.state.workers if HeldSeats.state else ():
            held[worker.metadata.node_id] = held.get(worker.metadata.node_id, 0) + 1
        return held


class SeatPolicy(ScalingPolicy):
    """Decides how many seats the run holds, from a fresh look at the cluster.

    Raises UserError, which ends the run, if there was no room for ``min_workers`` for ``wait_timeout_s`` seconds.
    """

    def __init__(self, scaling_config: ScalingConfig, request: SeatRequest):
        super().__init__(scaling_config)
        self._request = request
        self._waiting_since: float | None = None
        self._looked = float("-inf")
        self._answered: dict[str, float] = {}  # when a silent node was last known to be there
        self._avoid: set[str] = set()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        request, view = self._request, look()
        self._looked, self._avoid = time.monotonic(), view.unusable | view.silent
        room = view.room(request, HeldSeats.by_node())
        if room >= request.min_workers:
            self._waiting_since = None
            return self._resize(room)
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since >= request.wait_timeout_s:
            each = " and ".join(count(amount, name) for name, amount in request.resources.items() if amount)
            raise UserError(
                f"{count(request.min_workers, 'worker')} with {each} each found no room for "
                f"{request.wait_timeout_s:g} s: {describe_cluster()}, with room for {room or 'none'} now. "
                "Add nodes, or ask for fewer workers."
            )
        time.sleep(WAIT_SECONDS)  # the controller asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        request = self._request
        if time.monotonic() - self._looked < request.interval_s:
            return NoopDecision()
        view, held = look(), HeldSeats.by_node()
        self._looked = time.monotonic()
        self._answered = {node: self._answered.get(node, self._looked) for node in view.silent}
        lost = view.unusable | {n for n, since in self._answered.items() if self._looked - since > SILENT_SECONDS}
        hesitating = {node: held[node] for node in view.silent - lost if node in held}
        room = min(view.room(request, held) + sum(hesitating.values()), request.max_workers or float("inf"))
        self._avoid = view.unusable | view.silent
        must_move = any(node in lost for node in held)
        if room < request.min_workers or (room <= sum(held.values()) and not must_move) or hesitating:
            return NoopDecision()
        return self._resize(int(room))

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Keep new seats off the nodes that Ray still believes in."""
        return {"ray.io/node-id": f"!in({','.join(sorted(self._avoid))})"} if self._avoid else None

    def _resize(self, num_workers: int) -> ResizeDecision:
        return ResizeDecision(num_workers=num_workers, resources_per_worker=self._request.resources)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._request.max_workers or self._request.min_workers


class LossPolicy(DefaultFailurePolicy):
    """Lost seats never end the run. Errors that a seat's own function raises do after a few times, a UserError at once.

    All else follows Ray Train's default policy: an error of our scaling policy ends the run.
    """

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            raised = _raised(training_failed_error)
            if not raised:
                return FailureDecision.RETRY
            if any(isinstance(error, UserError) for error in raised):
                return FailureDecision.RAISE
        elif isinstance(getattr(training_failed_error, "controller_failure", None), ray.exceptions.RayActorError):
            return FailureDecision.RETRY  # lost while the group started
        return super().make_decision(training_failed_error)


def _raised(error: WorkerGroupError) -> list[BaseException]:
    """Return the errors that the seats' functions raised; a seat whose process was lost raised none."""
    return [failure for failure in error.worker_failures.values() if not isinstance(failure, LOST)]


class SeatTrainer(DataParallelTrainer):
    """A Ray Train run whose workers only hold seats.

    Args:
        sit: called with ``config`` in every seat; the run is over when all calls have returned. It is called anew, in
            a new process, whenever the seats change.
        config: argument of ``sit``.
        request: which seats to hold.
        name: name of Ray Train's own run, under ``storage_path``.
        storage_path: directory or URI for Ray Train's own small records.
    """

    def __init__(self, sit: Callable[[Any], None], config: Any, request: SeatRequest, name: str, storage_path: str):
        super().__init__(
            sit,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=request.min_workers,
                use_gpu=request.resources.get("GPU", 0) > 0,
                resources_per_worker=request.resources,
                placement_strategy="STRICT_SPREAD" if request.one_per_node else "PACK",
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage_path,
                failure_config=FailureConfig(max_failures=3),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        self._request = request
        self._controller: Any = None

    def fit(self) -> None:
        """Hold the seats until all of them have returned.

        Raises:
            UserError: no room within ``wait_timeout_s`` seconds, or one that a seat raised.
            ray.train.TrainingFailedError: the seats' function keeps raising, or Ray Train itself fails.
            KeyboardInterrupt: after the seats were given up.
        """
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            super().fit()
        except ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from None
            raise
        except WorkerGroupError as error:
            for raised in _raised(error):
                if isinstance(raised, UserError):
                    raise raised from None
            raise
        except KeyboardInterrupt:
            self.give_up()
            raise

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments |= {
            "scaling_policy": SeatPolicy(self.scaling_config, self._request),
            "failure_policy": LossPolicy(self.run_config.failure_config),
        }
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[WorkerGroupCallback]:
        # The others set up what a seat does not use. Without the cleaner, the seats of a controller that dies alone
        # would stay reserved until the driver ends.
        return [PlacementGroupCleanerCallback(), HeldSeats()]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Python's own handler stays: Ray Train's waits for a controller that may be waiting for room, and exits."""
        self._controller = controller

    def give_up(self) -> None:
        """Let the seats go, so that `fit` ends, as Ctrl-C does."""
        if self._controller is not None:
            try:
                ray.get(self._controller.abort.remote(), timeout=5)
            except ray.exceptions.RayError:  # it has ended, as it should, or does not listen
                ray.kill(self._controller)
