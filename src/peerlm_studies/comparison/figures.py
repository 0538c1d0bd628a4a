"""The plot of a comparison: held-out loss over training FLOPs and over seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm_studies.figures import finish


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out loss over training FLOPs and over seconds, a colour per label and a line per seed, as a PNG.

    The last evaluation of a run is left out where it read other windows than those before it: it does not compare.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_flops, over_seconds = figure.subplots(1, 2, sharey=True)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for row in rows:
        first = row is next(other for other in rows if other["label"] == row["label"])
        style = {
            "color": f"C{labels.index(row['label']) % 10}",
            "label": row["label"] if first else None,
            "marker": ".",
            "linewidth": 1.2,
        }
        evaluation = row["config"]["eval"]
        alike = len(row["curve"]) == 1 or evaluation["windows"] == evaluation["final_windows"]
        curve = row["curve"] if alike else row["curve"][:-1]
        losses = [point["validation_loss"] for point in curve]
        over_flops.plot([point["flops"] for point in curve], losses, **style)
        over_seconds.plot([point["seconds"] for point in curve], losses, **style)
    over_flops.set(xlabel="training FLOPs", ylabel="held-out loss (nats per token)")
    over_seconds.set(xlabel="training seconds")
    over_flops.legend(frameon=False)
    for axes in (over_flops, over_seconds):
        finish(axes)
    figure.savefig(path, dpi=130)
