"""Plots beside the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float]]


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


def _smoothed(curve: Curve) -> list[tuple[int, float]]:
    """An exponential moving average over about a fiftieth of the curve, without its bias towards the start."""
    decay = 1 - 1 / max(1.0, len(curve) / 50)
    average, weight, smoothed = 0.0, 0.0, []
    for step, value in curve:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, average / weight))
    return smoothed
