"""Plots of rows of finished runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out loss over training FLOPs and over seconds, a colour per label and a line per seed, as a PNG.

    The last evaluation of a run is left out where it read other windows than those before it: it does not compare.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_flops, over_seconds) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
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
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_neurons(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Relative error of layers' outputs and increase of perplexity over the share of neurons retrieved, as a PNG.

    A colour per way to retrieve; errors are means over layers.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (error_axes, perplexity_axes) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for retrieval in dict.fromkeys(row["retrieval"] for row in rows):
        points = sorted((row for row in rows if row["retrieval"] == retrieval), key=lambda row: row["share"])
        shares = [100 * row["share"] for row in points]
        style = {"label": retrieval, "marker": ".", "linewidth": 1.2}
        errors = [sum(row["errors"].values()) / len(row["errors"]) for row in points]
        error_axes.plot(shares, errors, **style)
        perplexity_axes.plot(shares, [row["perplexity"] / row["dense_perplexity"] for row in points], **style)
    error_axes.set(ylabel="relative error of layers' outputs")
    perplexity_axes.set(ylabel="perplexity over that of the dense model", yscale="log")
    error_axes.legend(frameon=False)
    for axes in (error_axes, perplexity_axes):
        axes.set(xlabel="share of neurons retrieved (%)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_forgetting(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss on what was learned over the rise of loss on what was known, a point per method, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.6), layout="constrained")
    for number, row in enumerate(summary):
        axes.plot(row["forgetting"], row["new_loss"], "o", color=f"C{number % 10}", label=row["label"])
    axes.set(xlabel="rise of the base domain's loss (nats per token)", ylabel="loss of a new domain after its stage")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
