"""Draw docs/performance.png from docs/performance.json: how near to the floor we and the alternative come.

python benchmarks/plot_performance.py
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads((DOCS / "performance.json").read_text())
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.4))
    for place, row in enumerate(reversed(rows)):
        for offset, side, color in ((0.19, "ours", "#2a6f97"), (-0.19, "alternative", "#c9a227")):
            share = row[side] / row["floor"]
            axes.barh(place + offset, share, height=0.36, color=color, label=side if place == 0 else None)
            axes.text(share + 0.01, place + offset, f"{row[side]:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)], fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.12 * max(1, *(row["ours"] / row["floor"] for row in rows)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel("share of what the machine's memory or its best product allows (numbers: tokens/s)")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "performance.png", dpi=130)


if __name__ == "__main__":
    main()
