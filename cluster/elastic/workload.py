"""What a host runs: the seam between the elastic hosts, which know nothing of training, and what is done in them."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from cluster.elastic.membership import Membership, Outcome, StateId
from doge.common.lease import Claim
from doge.common.storage import Storage


class Stage(StrEnum):
    """What a host is doing, as far as others have to wait for it."""

    STARTING = "starting"  # its process imports what it needs
    IDLE = "idle"  # in no membership
    JOINING = "joining"  # it waits for the other members
    BUILDING = "building"  # it takes up the state: computing, or waiting for others
    STEPPING = "stepping"  # within a step
    BETWEEN = "between"  # work of its own beside the steps: reading data, evaluating, handing over a checkpoint
    CLOSING = "closing"  # it leaves the membership

    @property
    def at_work(self) -> bool:
        """Whether a member in this stage has taken up the membership's state."""
        return self in (Stage.STEPPING, Stage.BETWEEN)


@dataclass(frozen=True)
class Beat:
    """How a host's workload is at one moment.

    Args:
        stage: what it is doing.
        activity: the same for a reader, such as ``evaluation``.
        waiting: whether it waits for other members right now.
        membership: number of the membership that it is or was last in.
        step: steps made.
        progress: grows with whatever is done: every micro-batch, every piece that is exchanged, every look for data.
        step_seconds: how long its last step took.
        enter_seconds: how long it took to enter the membership, by its own clock.
        held: id of the newest state that it holds.
    """

    stage: Stage = Stage.STARTING
    activity: str = "start"
    waiting: bool = False
    membership: int = 0
    step: int = 0
    step_seconds: float = 0.0
    progress: int = 0
    held: StateId | None = None
    enter_seconds: float = 0.0


class HeldState(Protocol):
    """A state that a host holds."""

    @property
    def id(self) -> StateId:
        """Its id."""

    def share(self) -> Any:
        """The state on its way to other hosts; what is in it is the workload's."""


class Workload(Protocol):
    """What a host keeps from one membership to the next, and what it does in one.

    ``warm_up``, ``newest_state``, ``run``, ``commit`` and ``flush`` are called one after another in one thread, the
    others from any thread at any time.
    """

    def warm_up(self) -> None:
        """Do slow first-time work before anyone waits for it."""

    def newest_state(self) -> HeldState | None:
        """The newest state that this host holds or finds; None for a fresh start.

        Raises:
            StorageError: without the storage this copy may be stale.
            UserError: every host would fail alike: the run ends.
        """

    def run(self, membership: Membership, rank: int, state: Any) -> Outcome:
        """Do this rank's part until the membership ends; never raises.

        Args:
            state: to start from, as `HeldState.share` gave it; None where this host holds it, or for a fresh start.
        """

    def beat(self) -> Beat:
        """How it is now."""

    def abort(self, number: int) -> None:
        """Stop what is under way in membership ``number``, or is to begin; does nothing in another."""

    def commit(self) -> None:
        """Hand the newest state that this host holds to be written, unless it is."""

    def flush(self) -> None:
        """Return once everything that was handed to be written is written."""


@dataclass(frozen=True)
class Job:
    """What a host is sent.

    Args:
        name: of the run.
        workload: ``package.module:name`` of a callable ``(Job, host name, leave) -> Workload``; ``leave`` is an event
            that is set when the membership shall end at the next step that all members can agree on.
        settings: for the workload.
        storage: root of everything durable, which opens from any node.
        claim: that the run may commit: nobody else has taken it over.
        board: actor handle of the driver's `Board`, which takes events.
        use_gpu: whether a host computes on a GPU.
    """

    name: str
    workload: str
    settings: Any
    storage: Storage
    claim: Claim
    board: Any
    use_gpu: bool

    def open(self, host: str, leave: threading.Event) -> Workload:
        """Import the workload's module and make the workload, in the host's process."""
        module, _, name = self.workload.partition(":")
        factory: Callable[[Job, str, threading.Event], Workload] = getattr(importlib.import_module(module), name)
        return factory(self, host, leave)
