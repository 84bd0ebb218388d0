"""The losses as a sink: a curve of bounded size for each, so that a run's end needs no tracking server."""

from typing import Any

from cluster.elastic.events import Event
from cluster.runs.sinks.sink import StateSink
from cluster.workloads.training_events import MetricsMeasured
from doge.common.storage import Storage

MAX_POINTS = 4096
CURVES = ("loss", "held_out_loss")


class BoundedCurve:
    """The values of a metric by step: of every step, or, where that would be too many, of every 2nd, 4th, 8th …

    Args:
        points: ``(step, value)`` in the order of steps.
        stride: steps between two points.
        last: the newest point, whatever its step.
    """

    def __init__(self, points: list[tuple[int, float]], stride: int = 1, last: tuple[int, float] | None = None):
        self._points, self._stride, self.last = points, stride, last

    def add(self, step: int, value: float) -> None:
        """Add a point; a step that is not newer than the last was made again, with an equal result."""
        if self.last is not None and step <= self.last[0]:
            return
        self.last = (step, value)
        if step % self._stride == 0:
            self._points.append(self.last)
        if len(self._points) > MAX_POINTS:
            self._stride *= 2
            self._points = [point for point in self._points if point[0] % self._stride == 0]

    @property
    def points(self) -> list[tuple[int, float]]:
        """The points that are kept and the newest one."""
        last = [self.last] if self.last is not None and self.last not in self._points[-1:] else []
        return [*self._points, *last]

    def to_dict(self) -> dict[str, Any]:
        return {"points": self._points, "stride": self._stride, "last": self.last}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BoundedCurve":
        last = values["last"]
        return cls([(int(step), value) for step, value in values["points"]], values["stride"], last and tuple(last))


class CurvesSink(StateSink):
    """Keeps ``curves.json`` in the run's directory.

    Args:
        directory: The run's directory.
    """

    name = "curves"

    def __init__(self, directory: Storage):
        super().__init__(directory, "curves.json")
        self._curves = {name: BoundedCurve([]) for name in CURVES}

    def curve(self, name: str) -> list[tuple[int, float]]:
        """``(step, value)`` in the order of steps, the newest always among them."""
        with self.lock:
            return self._curves[name].points

    def take(self, event: Event) -> None:
        if isinstance(event, MetricsMeasured):
            for name in self._curves.keys() & event.metrics.keys():
                self._curves[name].add(event.step, event.metrics[name])

    def to_dict(self) -> dict[str, Any]:
        return {"curves": {name: curve.to_dict() for name, curve in self._curves.items()}}

    def restore(self, values: dict[str, Any]) -> None:
        self._curves = {name: BoundedCurve.from_dict(values["curves"][name]) for name in CURVES}
