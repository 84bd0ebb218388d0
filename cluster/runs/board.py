"""The board: an actor through which hosts tell the driver what happens and learn that the run is over.

It lives on the driver's node and ends with the run. Events that are posted before `settle` is called are in the
driver's journal when it returns, so that a checkpoint never gets ahead of the run's record.
"""

import asyncio
import time
from contextlib import suppress
from typing import Any, Protocol

from cluster.elastic.events import Event
from doge.common.errors import UserError

BUSY_SECONDS = 0.5  # between two calls of a board that cannot take one now

_MEMORY_SIGNS = ("memory usage threshold", "low on memory", "OutOfMemory", "(OOM)")  # in what Ray's memory monitor says


class Board:
    """The actor's class; `BoardActor` starts one."""

    def __init__(self) -> None:
        self._waiting: list[Event] = []  # posts that are not in the journal yet
        self._journaled = 0  # posts that are
        self._stopped: str | None = None
        self._unrecorded: str | None = None
        self._publisher = 0  # the latest membership of which a member has begun to publish
        self._progress = asyncio.Condition()

    async def post(self, *events: Event) -> None:
        self._waiting.extend(events)

    async def take(self, journaled: int) -> list[Event]:
        """Drop the first ``journaled`` posts of all, which are in the journal, and return those after them."""
        async with self._progress:
            del self._waiting[: journaled - self._journaled]
            self._journaled = journaled
            self._progress.notify_all()
        return list(self._waiting)

    async def settle(self) -> str | None:
        """Return once all that was posted before is in the journal: None, or why it cannot be recorded."""
        posted = self._journaled + len(self._waiting)
        async with self._progress:
            await self._progress.wait_for(lambda: self._journaled >= posted)
        return self._unrecorded

    async def may_publish(self, membership: int) -> bool:
        """Whether a member of this membership may publish a checkpoint: no member of a later one has begun to.

        A writer that was stopped, or was cut off, may come back when others have gone on without it.
        """
        self._publisher = max(self._publisher, membership)
        return membership == self._publisher

    async def stop(self, reason: str, unrecorded: bool = False) -> None:
        """End the run for good; the first reason stays.

        Args:
            unrecorded: whether the driver cannot record any more, so that nothing may be committed either.
        """
        self._stopped = self._stopped or reason
        if unrecorded:
            self._unrecorded = self._unrecorded or reason

    async def stopped(self) -> str | None:
        """Why the run was stopped, None while it was not."""
        return self._stopped

    async def now(self) -> float:
        """Seconds of the monotonic clock of the driver's node, by which every host's is read."""
        return time.monotonic()


class DriverBoard(Protocol):
    """The driver's side of a board, in calls that wait for their answer."""

    def take(self, journaled: int) -> list[Event]: ...

    def stop(self, reason: str, unrecorded: bool = False) -> None: ...

    def stopped(self) -> str | None: ...


class BoardLost(UserError):
    """The board has ended, and with it whatever its hosts had told and the journal had not got."""


class BoardActor:
    """A board that runs as an actor on this node; ``handle`` is what hosts are sent.

    `take` and `stopped` raise BoardLost once the actor has ended.
    """

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
        self.handle: Any = ray.remote(Board).options(**options).remote()

    def take(self, journaled: int) -> list[Event]:
        taken: list[Event] = self._ask("take", journaled)
        return taken

    def stop(self, reason: str, unrecorded: bool = False) -> None:
        with suppress(BoardLost):  # nobody goes on without it
            self._ask("stop", reason, unrecorded)

    def stopped(self) -> str | None:
        reason: str | None = self._ask("stopped")
        return reason

    def close(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self.handle)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the actor's method, each of which may be called twice, and return the answer."""
        import ray

        while True:
            try:
                return ray.get(getattr(self.handle, method).remote(*arguments))
            except ray.exceptions.ActorUnavailableError:  # too busy to take a call
                time.sleep(BUSY_SECONDS)
            except ray.exceptions.RayError as error:
                raise BoardLost(why_ray_ended("the process that gathers what the workers tell", error)) from error


def why_ray_ended(what: str, error: Exception) -> str:
    """A sentence without its full stop: a process on this machine was ended, why if that is known, and what to do."""
    text = str(error).strip()
    if any(sign in text for sign in _MEMORY_SIGNS):
        return (
            f"This machine's memory is full, and Ray ended {what}: free some of it and run the same command to resume"
        )
    last = text.splitlines()[-1].strip().removesuffix(".")[:200] if text else type(error).__name__
    return f"Ray lost {what} ({last}): run the same command to resume"
