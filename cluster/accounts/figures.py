"""The ledger's figures, as lines for a reader and as metrics for MLflow."""

from dataclasses import dataclass

from doge.common.words import count, duration

_NODES_SHOWN, _WORKERS_SHOWN = 16, 8


@dataclass(frozen=True)
class WorkerFigures:
    """Figures of one worker: tokens of the steps that count; seconds, energy and cost of its whole stay."""

    host: str
    node: str
    device: str
    seconds: float
    tokens: int
    energy_kwh: float | None
    cost: float | None
    seconds_of: dict[str, float]


@dataclass(frozen=True)
class Figures:
    """Figures of a run. Shares and goodput are between 0 and 1; None is unknown.

    Args:
        wall_seconds: Seconds in which a driver ran.
        goodput: See `cluster.accounts.goodput`; None before a group has made two steps.
        lost: The rest of goodput to 1, by cause: ``repeated``, ``absence``, ``spares``, ``restarts``.
        shares: Shares of the workers' time, by kind.
        steps: Finished steps, each counted once.
        lost_steps: Steps that were made and then made again.
        restarts: Number of times that stepping stopped and began anew.
        restart_seconds: Median time from the last step before a restart to the beginning of the first step after it.
        tokens_per_s: Tokens of steps that count, over the wall time.
        undisturbed_tokens_per_s: Speed of the fastest group.
        energy_kwh: Energy of the workers whose energy could be read.
        cost: Cost of the devices that have a price, and of electricity; None if neither is known.
        unpriced: Devices without a price.
    """

    wall_seconds: float
    goodput: float | None
    lost: dict[str, float]
    shares: dict[str, float]
    steps: int
    lost_steps: int
    restarts: int
    restart_seconds: float | None
    tokens: int
    tokens_per_s: float
    undisturbed_tokens_per_s: float | None
    energy_kwh: float | None
    cost: float | None
    currency: str
    unpriced: list[str]
    workers: list[WorkerFigures]

    @property
    def busy_share(self) -> float:
        """Share of all workers' time spent computing steps that count."""
        return self.shares.get("step", 0.0)

    @property
    def nodes(self) -> dict[str, list[WorkerFigures]]:
        """The workers of each node."""
        nodes: dict[str, list[WorkerFigures]] = {}
        for worker in self.workers:
            nodes.setdefault(worker.node, []).append(worker)
        return nodes

    def rows(self) -> list[tuple[str, str]]:
        """The figures as ``(label, text)`` lines for a reader."""
        rows = [("goodput", self._goodput_text()), ("workers' time", self._time_text())]
        speed = f"{self.tokens_per_s:,.0f} tokens/s"
        if self.undisturbed_tokens_per_s is not None:
            speed += f" of {self.undisturbed_tokens_per_s:,.0f} undisturbed"
        rows.append(("time", f"{duration(self.wall_seconds)} for {self.tokens:,} tokens: {speed}"))
        restarts = f"{self.lost_steps:,} made again after {count(self.restarts, 'restart')}"
        if self.restart_seconds is not None:
            restarts += f" of {self.restart_seconds:.1f} s (median)"
        rows.append(("lost steps", restarts))
        nodes = sorted(self.nodes.items(), key=lambda item: -sum(worker.tokens for worker in item[1]))
        for node, workers in nodes[:_NODES_SHOWN]:
            each = ", ".join(f"{worker.host} {worker.tokens:,}" for worker in workers[:_WORKERS_SHOWN])
            more = f" and {len(workers) - _WORKERS_SHOWN} more" if len(workers) > _WORKERS_SHOWN else ""
            rows.append((f"on {node}", f"{sum(worker.tokens for worker in workers):,} tokens ({each}{more})"))
        if len(nodes) > _NODES_SHOWN:
            tokens = sum(worker.tokens for _, workers in nodes[_NODES_SHOWN:] for worker in workers)
            rows.append((f"on {len(nodes) - _NODES_SHOWN} more nodes", f"{tokens:,} tokens"))
        if self.energy_kwh is not None:
            read = sum(worker.energy_kwh is not None for worker in self.workers)
            of = "" if read == len(self.workers) else f" by {read} of {len(self.workers)} workers; the rest is unknown"
            rows.append(("energy", f"{self.energy_kwh:,.4g} kWh{of}"))
        rows.append(("cost", self._cost_text()))
        return rows

    def metrics(self) -> dict[str, float]:
        """The figures as metrics for MLflow, without those that are unknown."""
        values = {
            name: getattr(self, name)
            for name in (
                "goodput", "busy_share", "wall_seconds", "steps", "lost_steps", "restarts", "restart_seconds", "tokens",
                "tokens_per_s", "undisturbed_tokens_per_s", "energy_kwh", "cost",
            )
        }  # fmt: skip
        values |= {f"lost/{cause}": share for cause, share in self.lost.items()}
        values |= {f"share/{kind}": share for kind, share in self.shares.items()}
        values |= {f"tokens/{node}": sum(worker.tokens for worker in ws) for node, ws in self.nodes.items()}
        return {f"ledger/{name}": float(value) for name, value in values.items() if value is not None}

    def _goodput_text(self) -> str:
        if self.goodput is None:
            return "unknown: too few steps to tell"
        text = f"{self.goodput:.1%} of the tokens of an undisturbed run of equal length"
        lost = [f"{cause} {share:.1%}" for cause, share in self.lost.items() if share >= 0.0005]
        return f"{text} (lost to {', '.join(lost)})" if lost else text

    def _time_text(self) -> str:
        shares = sorted(self.shares.items(), key=lambda item: -item[1])
        rest = [f"{kind} {share:.1%}" for kind, share in shares if kind != "step" and share >= 0.0005]
        return ", ".join([f"busy in steps that count {self.busy_share:.1%}", *rest])

    def _cost_text(self) -> str:
        missing = f"no price for {', '.join(self.unpriced)}: set ledger.prices_per_hour" if self.unpriced else ""
        if self.cost is None:
            return f"unknown, {missing}" if missing else "unknown"
        return f"{self.currency}{self.cost:,.2f}" + (f", without these: {missing}" if missing else "")
