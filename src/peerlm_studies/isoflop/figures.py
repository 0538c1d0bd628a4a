"""Plots of an isoFLOP study: loss over size, and perplexity over FLOPs and seconds."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerlm_studies.figures import finish
from peerlm_studies.isoflop.curves import Curve, frontiers
from peerlm_studies.isoflop.seconds import Cost
from peerlm_studies.row_cost import read_bytes_per_token


def plot_curves(curves: Sequence[Curve]) -> Figure:
    """Loss over active parameters: a panel per budget, a colour per method, a star at a parabola's lowest point."""
    budgets = sorted({curve.flops for curve in curves})
    methods = _methods(curves)
    figure = Figure(figsize=(1.5 + 3.6 * len(budgets), 4), layout="constrained")
    panels = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axes, flops in zip(panels, budgets, strict=True):
        for curve in (curve for curve in curves if curve.flops == flops):
            _draw_curve(axes, curve, f"C{methods.index(curve.method) % 10}")
        axes.set(xscale="log", xlabel="active parameters", title=f"{flops:.3g} FLOPs")
        axes.minorticks_off()
        sizes = [point.active_parameters for curve in curves for point in curve.points if curve.flops == flops]
        shown = np.geomspace(min(sizes), max(sizes), 3) if max(sizes) > min(sizes) else sizes[:1]
        axes.set_xticks(shown, [f"{size / 1e6:.3g}M" for size in shown])
        finish(axes)
    panels[0].set_ylabel("held-out loss (nats per token)")
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
    return figure


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    sizes = np.array([point.active_parameters for point in curve.points], dtype=float)
    for point in curve.points:
        axes.plot([point.active_parameters] * len(point.losses), point.losses, ".", color=colour)
    if curve.optimum.coefficients is not None:
        between = np.geomspace(sizes[0], sizes[-1], 60)
        axes.plot(between, np.polyval(curve.optimum.coefficients, np.log(between)), color=colour, label=curve.method)
        if curve.optimum.size is not None and curve.optimum.loss is not None:
            axes.plot([curve.optimum.size], [curve.optimum.loss], "*", color=colour, markersize=10)
    else:
        axes.plot(sizes, [point.loss for point in curve.points], ":", color=colour, label=curve.method)


def plot_costs(curves: Sequence[Curve], seconds: Cost) -> Figure:
    """Perplexity of runs nearest to optima over FLOPs and over bytes read per token; over seconds the frontier of all.

    Panels of bytes or seconds are left out where these are not known.
    """
    methods = _methods(curves)
    fronts = frontiers(curves, seconds)
    points = [curve.nearest for curve in curves]
    bytes_read = {
        id(curve): read_bytes_per_token(point.rows[min(point.rows)])
        for curve, point in zip(curves, points, strict=True)
    }
    names = ["flops", *(["seconds"] if fronts else []), *(["bytes"] if any(bytes_read.values()) else [])]
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    panels: dict[str, Axes] = dict(
        zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True)
    )
    for method in methods:
        own = sorted((curve for curve in curves if curve.method == method), key=lambda curve: curve.flops)
        style: dict[str, Any] = {"color": f"C{methods.index(method) % 10}", "marker": ".", "label": method}
        nearest = [(curve, math.exp(np.mean(curve.nearest.losses))) for curve in own]
        panels["flops"].plot([curve.flops for curve, _ in nearest], [perplexity for _, perplexity in nearest], **style)
        if "seconds" in panels:
            front = fronts.get(method, [])
            panels["seconds"].plot([cost for cost, _ in front], [math.exp(loss) for _, loss in front], **style)
        if "bytes" in panels:
            known = [(read, perplexity) for curve, perplexity in nearest if (read := bytes_read[id(curve)])]
            panels["bytes"].plot([read / 2**10 for read, _ in known], [perplexity for _, perplexity in known], **style)
    titles = {
        "flops": "training FLOPs",
        "seconds": "seconds of training",
        "bytes": "KiB of parameters read per token, forward pass",
    }
    for name, axes in panels.items():
        axes.set(xscale="log", yscale="log", xlabel=titles[name])
        finish(axes)
    panels["flops"].set_ylabel("held-out perplexity")
    panels["flops"].legend(frameon=False)
    return figure


def _methods(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.method for curve in curves))
