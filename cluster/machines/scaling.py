"""How many workers a run may have, what each reserves, and how patient the run is with them."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from doge.common.errors import UserError


@dataclass(frozen=True)
class ScalingRecipe:
    num_workers: int | tuple[int, int] | None = None
    """Worker count, or MIN MAX. Default: from one up to one per GPU, without GPUs up to one per machine."""
    use_gpu: bool | None = None
    """Whether workers compute on GPUs. Default: if the cluster has any."""
    num_cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker. Without a GPU, a worker computes on its share of its node's cores,
    however many are reserved."""
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources that each worker reserves as well, in clusters that mark their nodes with them."""
    shares: Literal["measured", "equal"] = "measured"
    """How a step is divided: by each worker's measured speed, or equally. Equal shares make the losses of two runs the
    same to the last digit."""
    wait_timeout_s: float = 600.0
    """Seconds to wait for room for the smallest number of workers before the run ends. 0: do not wait."""
    hang_timeout_s: float = 60.0
    """Seconds without an answer after which a worker counts as lost and is replaced."""
    warm_spares: int = 1
    """Spare processes per node that have imported everything and can replace a lost worker at once."""
    max_failures: int = 8
    """Consecutive failures without progress before the run stops; also failed starts before a node is skipped. -1: no
    limit."""
    address: str | None = None
    """Address of the Ray cluster. Default: the one that this machine belongs to, else a new one on it alone."""

    def __post_init__(self) -> None:
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
        if self.resources_per_worker.get("GPU", 1) != 1:
            raise UserError(
                f"scaling.resources_per_worker asks for {self.resources_per_worker['GPU']:g} GPU, but a worker takes "
                "one whole GPU: leave GPU out, and set --scaling.use-gpu."
            )
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
        """None stands for as many as the cluster has room for."""
        return self.num_workers if isinstance(self.num_workers, int | None) else self.num_workers[1]


@dataclass(frozen=True)
class SeatRequest:
    """The seats that a run asks for.

    Args:
        resources: that a seat reserves, such as ``{"CPU": 1, "GPU": 1}``; at least one is above 0.
        min_workers: below which the run waits.
        max_workers: at most; None takes all that the cluster has, and asks no autoscaler for more than ``min_workers``.
        most: workers that there is work for, whatever the cluster has; None is no bound.
        wait_timeout_s: seconds to wait for room before the run fails.
        interval_s: seconds between two looks at the cluster while the seats are held.
        one_per_node: whether a node has room for one seat at most.
    """

    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    min_workers: int = 1
    max_workers: int | None = None
    most: int | None = None
    wait_timeout_s: float = 600.0
    interval_s: float = 2.0
    one_per_node: bool = False
