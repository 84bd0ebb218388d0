"""Measures where a step's time goes: this rank's own computing, and waiting for others."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Named spans on the device's clock. A span within another interrupts it, so that no time counts twice.

    On a GPU the marks are events of the current stream: setting them does not wait for the GPU, reading them does.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.current = "other"  # the span that is open
        self._marks: list[tuple[str, Any]] = []  # the span that ended there, and when

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        outer = self.current
        self._mark()
        self.current = name
        try:
            yield
        finally:
            self._mark()
            self.current = outer

    def rename(self, old: str, new: str) -> None:
        """Count the time spent as ``old`` until now as ``new``."""
        self._marks = [(new if name == old else name, mark) for name, mark in self._marks]

    def seconds(self) -> dict[str, float]:
        """Seconds by name of span; 0 for a span that never began."""
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (_, begin), (name, end) in pairwise(self._marks):
            spent[name] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        return spent

    @contextmanager
    def watch_collectives(self) -> Iterator[None]:
        """Count DeepSpeed's collectives as "wait" inside the block."""
        import deepspeed.comm.comm as comm  # its functions look this module's ``cdb`` up at every call

        backend = comm.cdb
        comm.cdb = _Watched(backend, self)
        try:
            yield
        finally:
            comm.cdb = backend

    def _mark(self) -> None:
        now: torch.cuda.Event | float
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self.current, now))


class _Watched:
    """Wraps a DeepSpeed backend, or the handle of a collective; the time of its methods counts as "wait"."""

    def __init__(self, watched: Any, clock: StepClock):
        self._watched, self._clock = watched, clock

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._watched, name)
        if not callable(attribute) or name.startswith(("get_", "is_", "has_", "new_")):
            return attribute

        def call(*args, **kwargs):
            with self._clock.span("wait"):
                result = attribute(*args, **kwargs)
            return _Watched(result, self._clock) if hasattr(result, "wait") else result

        return call
