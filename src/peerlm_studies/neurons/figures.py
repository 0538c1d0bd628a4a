"""The plot of how few neurons suffice: errors and perplexity over the share retrieved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm_studies.figures import finish


def plot_neurons(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Relative error of layers' outputs and increase of perplexity over the share of neurons retrieved, as a PNG.

    A colour per way to retrieve; errors are means over layers.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    error_axes, perplexity_axes = figure.subplots(1, 2)
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
        finish(axes)
    figure.savefig(path, dpi=130)
