"""The plot of a study of equal seconds."""

from matplotlib.figure import Figure

from peerlm_studies.equal_seconds.tables import Table, best_of_families
from peerlm_studies.figures import add_legend, finish, line_style, name_ticks


def plot_seconds(table: Table) -> Figure:
    """Perplexity over seconds: a line through the best setting of each family, other settings as small dots.

    Both axes are logarithmic. Bars are intervals.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (family, best) in enumerate(best_of_families(table).items()):
        style = line_style(number)
        bars = [(row["half_width"] or 0.0) * row["perplexity"] for row in best]
        seconds, perplexities = ([row[name] for row in best] for name in ("seconds", "perplexity"))
        axes.errorbar(seconds, perplexities, bars, marker="o", label=family, **style)
        others = [row for row in table if row["family"] == family and row not in best]
        axes.plot(
            [row["seconds"] for row in others],
            [row["perplexity"] for row in others],
            marker="o",
            markersize=3,
            linestyle="none",
            color=style["color"],
            alpha=0.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="seconds of training steps", ylabel="held-out perplexity")
    points = sorted({row["seconds"] for row in table})
    axes.set_xticks(points, [f"{point:,g}" for point in points])
    name_ticks(axes)
    add_legend(figure, axes)
    finish(axes)
    return figure
