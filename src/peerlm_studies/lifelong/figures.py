"""The plot of plasticity against forgetting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm_studies.figures import add_legend, finish, save_plot


def plot_forgetting(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss on what was learned over the rise of loss on what was known, a point per method, as a PNG."""
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(summary):
        axes.plot(row["forgetting"], row["new_loss"], "o", color=f"C{number % 10}", label=row["label"])
    axes.set(xlabel="rise of the base domain's loss (nats per token)", ylabel="loss of a new domain after its stage")
    add_legend(figure, axes)
    finish(axes)
    save_plot(figure, path)
