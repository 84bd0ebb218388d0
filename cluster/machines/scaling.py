"""How many workers a run may have, what each reserves, and how patient the run is with them."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from doge.common.errors import UserError


@dataclass(frozen=True)
class ScalingRecipe:
    num_workers: int | tuple[int, int] | None = None
    """Workers that train: so many, or from a minimum to a maximum as they come and go; by default from one to all that
    the cluster has: one for each GPU, or one for each machine without GPUs."""
    use_gpu: bool | None = None
    """By default, whether the cluster has GPUs."""
    num_cpus_per_worker: float = 1.0
    """What Ray reserves for a worker; without a GPU it computes on its share of the node's cores all the same."""
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """Custom resources of Ray that a worker needs besides, for clusters that mark their nodes."""
    shares: Literal["measured", "equal"] = "measured"
    """Whether a worker's share of a step follows its speed; equal shares give two runs the same losses to the digit."""
    wait_timeout_s: float = 600.0
    """Seconds to wait for the smallest number of workers before the run ends; 0 does not wait."""
    hang_timeout_s: float = 60.0
    """Seconds without an answer after which a worker counts as lost and is replaced."""
    warm_spares: int = 1
    """Processes on every node that have imported everything and wait to take a lost worker's place."""
    max_failures: int = 8
    """Times in a row that the workers may fail without a new step having been made, and that a process may fail to
    start on a node before that is left out; -1 sets no limit."""
    address: str | None = None
    """Of a Ray cluster; by default the one this machine belongs to, or a new one of this machine alone."""

    def __post_init__(self):
        if self.min_workers < 1:
            raise UserError(f"scaling.num_workers must be at least 1, not {self.num_workers}.")
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise UserError(
                f"scaling.num_workers goes from {self.min_workers} down to {self.max_workers}: give the minimum first."
            )
        if not 0 <= self.num_cpus_per_worker < inf:
            raise UserError(
                f"scaling.num_cpus_per_worker must be finite and not negative, not {self.num_cpus_per_worker}."
            )
        if self.num_cpus_per_worker == 0 and not self.resources_per_worker and not self.use_gpu:
            raise UserError("scaling.num_cpus_per_worker may be 0 only for workers that reserve something else.")
        if self.max_failures < -1:
            raise UserError(f"scaling.max_failures must be at least -1 (no limit), not {self.max_failures}.")
        for name in ("wait_timeout_s", "warm_spares"):
            if not getattr(self, name) >= 0:
                raise UserError(f"scaling.{name} must not be negative, not {getattr(self, name)}.")
        if not self.hang_timeout_s >= 5:
            raise UserError(f"scaling.hang_timeout_s must be at least 5 seconds, not {self.hang_timeout_s}.")

    @property
    def min_workers(self) -> int:
        if self.num_workers is None:
            return 1
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int | None:
        """None is as many as the cluster has room for."""
        return self.num_workers if isinstance(self.num_workers, int | None) else self.num_workers[1]


@dataclass(frozen=True)
class SeatRequest:
    """The seats that a run asks for.

    Args:
        resources: that a seat reserves, such as ``{"CPU": 1, "GPU": 1}``; at least one is above 0.
        min_workers: below which the run waits.
        max_workers: at most; None takes all that the cluster has, and asks no autoscaler for more than ``min_workers``.
        wait_timeout_s: seconds to wait for room before the run fails.
        interval_s: seconds between two looks at the cluster while the seats are held.
        one_per_node: whether a node has room for one seat at most.
    """

    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    min_workers: int = 1
    max_workers: int | None = None
    wait_timeout_s: float = 600.0
    interval_s: float = 2.0
    one_per_node: bool = False
