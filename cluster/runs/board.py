"""The board: an actor through which workers tell the driver what happens and learn that it is over.

It lives on the driver's node and ends with the driver. What is posted before `settle` returns has been dealt with by
the driver (logged, written), so that a checkpoint never gets ahead of its own record.
"""

import asyncio
import time

from cluster.elastic.events import Event


class Board:
    """The actor's class; `open_board` starts one."""

    def __init__(self):
        self._posts: list[Event] = []
        self._handled = 0
        self._stopped: str | None = None
        self._unrecorded: str | None = None
        self._progress = asyncio.Condition()

    async def post(self, event: Event) -> None:
        self._posts.append(event)

    async def take(self, handled: int) -> list[Event]:
        """The posts after the first ``handled``, which the driver has dealt with."""
        async with self._progress:
            for place in range(self._handled, handled):
                self._posts[place] = None
            self._handled = handled
            self._progress.notify_all()
        return self._posts[handled:]

    async def settle(self) -> str | None:
        """Return once the driver has dealt with all that was posted before: None, or why it could not record it."""
        posted = len(self._posts)
        async with self._progress:
            await self._progress.wait_for(lambda: self._handled >= posted)
        return self._unrecorded

    async def stop(self, reason: str, unrecorded: bool = False) -> None:
        """End the run for good: no restart of the workers goes on. The first reason stays.

        ``unrecorded`` says that the driver cannot record any more, so that nothing may be committed either.
        """
        self._stopped = self._stopped or reason
        if unrecorded:
            self._unrecorded = self._unrecorded or reason

    async def stopped(self) -> str | None:
        return self._stopped

    async def now(self) -> float:
        """The driver's node's monotonic clock, by which every host's is read."""
        return time.monotonic()


def open_board():
    """Start a board on this node; returns the actor's handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()
