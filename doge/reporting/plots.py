"""Plots beside the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Curve = Sequence[tuple[int, float]]

# What a worker's time goes to, from the bottom of its lane to the top: work, stalls that are usual, losses.
KIND_COLORS = {
    "step": "#3a9a6c", "data": "#f0b429", "others": "#8fc1e3", "checkpoint": "#8d6cab", "evaluation": "#2f6690",
    "repeated": "#f08a9d", "restart": "#cf3b4a", "start": "#8a8f98", "idle": "#dfe2e6",
}  # fmt: skip
# Kinds are called in the legend what a reader understands without the ledger's documentation.
_KIND_LABELS = {
    "step": "step", "data": "waiting for data", "others": "waiting for others", "checkpoint": "checkpoint",
    "evaluation": "evaluation", "repeated": "repeated step", "restart": "restart", "start": "starting", "idle": "idle",
}  # fmt: skip


@dataclass(frozen=True)
class Lane:
    """One line of a timeline: hosts of one node that were there one after another.

    Args:
        node: its name.
        device: of the last host.
        hosts: their names.
        shares: kind → bin → share of the bin that it took, between 0 and 1.
    """

    node: str
    device: str
    hosts: tuple[str, ...]
    shares: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Timeline:
    """Who did what when; times in seconds since the run began.

    Args:
        lanes: those of a node beside each other.
        bin_seconds: width of a bin.
        end: of the run.
        changes: when the group of workers changed.
        gaps: where the run lay still until another driver went on with it.
    """

    lanes: Sequence[Lane]
    bin_seconds: float
    end: float
    changes: Sequence[float]
    gaps: Sequence[float]


def plot_losses(path: str | Path, training: Curve, held_out: Curve, baselines: Mapping[str, float], title: str) -> None:
    """Draw the losses in nats over the steps as a PNG, with the baselines as level lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training")
        axes.plot(*zip(*_smoothed(training), strict=True), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    for (name, loss), style in zip(baselines.items(), (":", "--", "-."), strict=False):
        axes.axhline(loss, color="gray", linestyle=style, linewidth=1, label=f"{name}, held out: {loss:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_timeline(path: str | Path, timeline: Timeline, title: str) -> None:
    """Draw one lane a worker as a PNG, grouped by node; a bin with several kinds is as high in each as its share."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    places, heads, top = _places(timeline.lanes)
    unit, name = _time_unit(timeline.end)
    bins = int(timeline.end / timeline.bin_seconds) + 1
    edges = np.append(np.arange(bins) * timeline.bin_seconds, timeline.end) / unit
    figure, axes = pyplot.subplots(figsize=(13, 1.6 + 0.3 * top), layout="constrained")
    for lane, place in zip(timeline.lanes, places, strict=True):
        floor = np.zeros(bins)
        for kind in KIND_COLORS:
            share = np.zeros(bins)
            for at, value in lane.shares.get(kind, {}).items():
                share[min(at, bins - 1)] += value
            if not share.any():
                continue
            # The last bin is cut off where the run ends.
            share[-1] *= timeline.bin_seconds / max(timeline.end - (bins - 1) * timeline.bin_seconds, 1e-9)
            roof = np.minimum(floor + share, 1)
            low, high = (place + 0.8 * (1 - np.append(level, level[-1])) for level in (floor, roof))
            axes.fill_between(edges, low, high, step="post", color=KIND_COLORS[kind], linewidth=0)
            floor = roof
    for place, text in heads:
        axes.annotate(
            text, (0, place), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
            fontsize=9, fontweight="bold", va="center",
        )  # fmt: skip
    faint = max(0.1, min(0.55, 30 / (len(timeline.changes) + 1)))
    change = {
        "color": "black",
        "linewidth": 0.7,
        "alpha": faint,
        "zorder": 0.5,
    }  # below the lanes: they hide no restart
    gap = {"color": "black", "linewidth": 2.2, "linestyle": "--"}
    for times, style in ((timeline.changes, change), (timeline.gaps, gap)):
        for at in times:
            axes.axvline(at / unit, **style)
    axes.set_yticks([place + 0.4 for place in places], [_lane_label(lane.hosts) for lane in timeline.lanes], fontsize=8)
    axes.set(xlabel=f"{name} since the run began", xlim=(0, max(timeline.end / unit, 1e-9)), ylim=(top, -0.1))
    axes.set_title(title, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    seen = [kind for kind in KIND_COLORS if any(lane.shares.get(kind) for lane in timeline.lanes)]
    handles = [Patch(color=KIND_COLORS[kind], label=_KIND_LABELS[kind]) for kind in seen]
    if timeline.changes:
        handles.append(Line2D([], [], **change, label=f"change of the group ({len(timeline.changes)})"))
    if timeline.gaps:
        handles.append(Line2D([], [], **gap, label="stopped, then continued"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _places(lanes: Sequence[Lane]) -> tuple[list[float], list[tuple[float, str]], float]:
    """Where each lane's top is and where each node's heading, in lanes from above, and where the last ends."""
    places, heads, at = [], [], 0.0
    for lane, before in zip(lanes, [None, *lanes], strict=False):
        if before is None or lane.node != before.node:
            devices = sorted({other.device for other in lanes if other.node == lane.node})
            heads.append((at + 0.45, f"{lane.node} · {', '.join(devices)}"))
            at += 0.85
        places.append(at)
        at += 1
    return places, heads, max(at, 1.0)


def _lane_label(hosts: Sequence[str]) -> str:
    return " → ".join(hosts) if len(hosts) < 3 else f"{hosts[0]} → … → {hosts[-1]}"


def _time_unit(seconds: float) -> tuple[float, str]:
    for unit, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit:
            return unit, name
    return 1.0, "seconds"


def _smoothed(curve: Curve) -> list[tuple[int, float]]:
    """An exponential moving average over about a fiftieth of the curve, without its bias towards the start."""
    decay = 1 - 1 / max(1.0, len(curve) / 50)
    average, weight, smoothed = 0.0, 0.0, []
    for step, value in curve:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, average / weight))
    return smoothed
