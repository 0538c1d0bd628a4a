"""The plots of a comparison: held-out loss over training FLOPs and over seconds; what models copy over tokens."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm_studies.comparison.tables import copied_nats
from peerlm_studies.figures import add_legend, finish, line_style, save_plot


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out loss over training FLOPs and over seconds, a style per label and a line per seed, as a PNG.

    The last evaluation of a run is left out where it read other windows than those before it: it does not compare.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_flops, over_seconds = figure.subplots(1, 2, sharey=True)
    for row, style in zip(rows, _styles(rows), strict=True):
        curve = _alike(row)
        losses = [point["validation_loss"] for point in curve]
        over_flops.plot([point["flops"] for point in curve], losses, **style)
        over_seconds.plot([point["seconds"] for point in curve], losses, **style)
    over_flops.set(xlabel="training FLOPs", ylabel="held-out loss (nats per token)")
    over_seconds.set(xlabel="training seconds")
    add_legend(figure, over_flops)
    for axes in (over_flops, over_seconds):
        finish(axes)
    save_plot(figure, path)


def plot_copying(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What runs copy in training: loss of repeating targets, and what repeated random tokens cost less, over tokens.

    None where no run measured copying (`eval.copying`); others are left out.
    """
    rows = [row for row in rows if any("copying" in point for point in row["curve"])]
    if not rows:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    in_text, at_random = figure.subplots(1, 2)
    for row, style in zip(rows, _styles(rows), strict=True):
        curve = [point for point in _alike(row) if "copying" in point]
        tokens, found = [point["tokens"] / 1e6 for point in curve], [point["copying"] for point in curve]
        in_text.plot(tokens, [math.nan if each["repeats"] is None else each["repeats"] for each in found], **style)
        at_random.plot(tokens, [copied_nats(each) for each in found], **style)
    for axes in (in_text, at_random):
        axes.set(xlabel="million tokens trained on")
        finish(axes)
    in_text.set(ylabel="loss of targets that repeat (nats)")
    at_random.set(ylabel="nats saved on repeated random tokens")
    add_legend(figure, in_text)
    return figure


def _styles(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How each row's lines are drawn: a style and one entry of the legend per label."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    first = {label: next(row for row in rows if row["label"] == label) for label in labels}
    return [
        {
            **line_style(labels.index(row["label"])),
            "label": row["label"] if row is first[row["label"]] else None,
            "marker": ".",
            "linewidth": 1.2,
        }
        for row in rows
    ]


def _alike(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A row's evaluations without the last, where that read other windows than those before it."""
    evaluation, curve = row["config"]["eval"], row["curve"]
    alike = len(curve) == 1 or evaluation["windows"] == evaluation["final_windows"]
    return curve if alike else curve[:-1]
