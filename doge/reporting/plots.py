"""Plots as PNG files: losses over steps, and lanes of time."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

P = ParamSpec("P")

Curve = Sequence[tuple[int, float]]
"""(step, value) pairs."""

Shares = Mapping[str, Mapping[int, float]]
"""kind → number of a bin → the part of the bin that the kind took, between 0 and 1."""


def _literal(plot: Callable[P, None]) -> Callable[P, None]:
    """Draw without a window, and every text as it is: a name may hold ``$``, or letters that the font lacks."""

    @functools.wraps(plot)
    def draw(*args: P.args, **kwargs: P.kwargs) -> None:
        import matplotlib

        matplotlib.use("Agg")
        literal: Any = {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
        with matplotlib.rc_context(literal), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            plot(*args, **kwargs)

    return draw


@_literal
def plot_losses(path: str | Path, training: Curve, held_out: Curve, baselines: Mapping[str, float], title: str) -> None:
    """Draw losses (nats per token) over the steps, with each baseline as a horizontal line."""
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


@_literal
def plot_lanes(
    path: str | Path,
    title: str,
    *,
    groups: Mapping[str, Sequence[tuple[str, Shares]]],
    kinds: Mapping[str, tuple[str, str]],
    bin_seconds: float,
    end: float,
    changes: tuple[str, Sequence[float]] = ("", ()),
    breaks: tuple[str, Sequence[float]] = ("", ()),
) -> None:
    """Draw what the time of several lanes went to. In a bin with several kinds, each is as high as its share.

    Args:
        path: PNG file to write.
        groups: Heading → its lanes from top to bottom, each with its label and shares.
        kinds: Kind → its label and color, from the bottom of a lane to the top.
        bin_seconds: Width of a bin in seconds.
        end: Time in seconds at which the lanes end; they begin at 0.
        changes: Label and times in seconds of thin vertical lines.
        breaks: Label and times in seconds of dashed vertical lines.
    """
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lanes, headings, top = _places(groups)
    unit, unit_name = _time_unit(end)
    bins = int(end / bin_seconds) + 1
    edges = np.append(np.arange(bins) * bin_seconds, end) / unit
    figure, axes = pyplot.subplots(figsize=(13, 1.6 + 0.3 * top), layout="constrained")
    for place, _, shares in lanes:
        floor = np.zeros(bins)
        for kind, (_, color) in kinds.items():
            share = np.zeros(bins)
            for number, value in shares.get(kind, {}).items():
                share[min(number, bins - 1)] += value
            if not share.any():
                continue
            # The last bin is cut off at the end.
            share[-1] *= bin_seconds / max(end - (bins - 1) * bin_seconds, 1e-9)
            roof = np.minimum(floor + share, 1)
            low, high = (place + 0.8 * (1 - np.append(level, level[-1])) for level in (floor, roof))
            axes.fill_between(edges, low, high, step="post", color=color, linewidth=0)
            floor = roof
    for place, heading in headings:
        axes.annotate(
            heading, (0, place), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
            fontsize=9, fontweight="bold", va="center",
        )  # fmt: skip
    seen = [kind for kind in kinds if any(shares.get(kind) for _, _, shares in lanes)]
    handles: list[Any] = [Patch(color=kinds[kind][1], label=kinds[kind][0]) for kind in seen]
    faint = max(0.1, min(0.55, 30 / (len(changes[1]) + 1)))
    # Changes are drawn below the lanes, so that they hide no short kind.
    thin: dict[str, Any] = {"color": "black", "linewidth": 0.7, "alpha": faint, "zorder": 0.5}
    dashed: dict[str, Any] = {"color": "black", "linewidth": 2.2, "linestyle": "--"}
    for (label, times), style in ((changes, thin), (breaks, dashed)):
        for at in times:
            axes.axvline(at / unit, **style)
        if times:
            handles.append(Line2D([], [], **style, label=label))
    axes.set_yticks([place + 0.4 for place, _, _ in lanes], [label for _, label, _ in lanes], fontsize=8)
    axes.set(xlabel=f"{unit_name} since the run began", xlim=(0, max(end / unit, 1e-9)), ylim=(top, -0.1))
    axes.set_title(title, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _places(
    groups: Mapping[str, Sequence[tuple[str, Shares]]],
) -> tuple[list[tuple[float, str, Shares]], list[tuple[float, str]], float]:
    """The lanes and the headings with their vertical places, in lanes from the top, and where the last lane ends."""
    lanes, headings, at = [], [], 0.0
    for heading, members in groups.items():
        headings.append((at + 0.45, heading))
        at += 0.85
        for label, shares in members:
            lanes.append((at, label, shares))
            at += 1
    return lanes, headings, max(at, 1.0)


def _time_unit(seconds: float) -> tuple[float, str]:
    """The seconds and the name of the unit that suits a length of time."""
    for unit, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit:
            return unit, name
    return 1.0, "seconds"


def _smoothed(curve: Curve) -> list[tuple[int, float]]:
    """Exponential moving average over about a fiftieth of the curve, corrected for its start at zero."""
    decay = 1 - 1 / max(1.0, len(curve) / 50)
    average, weight, smoothed = 0.0, 0.0, []
    for step, value in curve:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, average / weight))
    return smoothed
