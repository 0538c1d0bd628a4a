"""A scaling law for each method, fitted to rows of runs: constants, uncertainty, and how it predicts held-out runs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm.errors import UserError, listed
from peerlm.files import write_bytes
from peerlm_studies.figures import finish
from peerlm_studies.intervals import explained, within
from peerlm_studies.markdown import markdown_rows
from peerlm_studies.rows import read_runs
from peerlm_studies.scaling.fit import CONSTANTS, Law, RunPoint, bootstrap, constants, fit_law, interval, varied
from peerlm_studies.scaling.law_file import rows_digest
from peerlm_studies.scaling.points import Group, groups_of

_STARTS_IN_TURN = 10
RANGES = ("size", "tokens", "granularity", "expansion")


def scaling(
    files: Sequence[str | Path],
    output: str | Path,
    *,
    methods: Sequence[str] = (),
    hold_out: float | None = None,
    up_to: float | None = None,
    times: int = 100,
    starts: int = 60,
) -> dict[str, Any]:
    """Fit a law to the runs of each method in files of rows, and write it as JSON, for `peerlm plan` and reports.

    Runs that differ in nothing but size, tokens, number of experts and seed belong to one fit (`groups_of`), which has
    the name of its first run's method. Those of the largest budget are predicted by a fit without them, and every model
    by a fit without it.

    Args:
        files: rows of `peerlm compare` or `peerlm isoflop`.
        output: JSON file to write.
        methods: only these; empty: all with runs enough, three more than constants.
        hold_out: runs of at least this many FLOPs are held out in place of those of the largest budget.
        up_to: runs of more FLOPs than this are left out altogether.
        times: draws of the bootstrap.
        starts: of each fit.

    Returns:
        What the file holds.

    Raises:
        UserError: there is no file, no run of at most `up_to` FLOPs, no method with runs enough, or a named method
            without them.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there are no rows at {file}: name a file that peerlm compare or peerlm isoflop wrote")
        rows += read_runs(Path(file))
    if up_to is not None and not (rows := [row for row in rows if row["summary"]["flops"] <= up_to]):
        raise UserError(f"no run in the rows has at most {up_to:g} FLOPs: raise --up-to")
    groups = {group.name: group for group in groups_of(rows)}
    for method in methods:
        if method not in groups:
            raise UserError(f"there is no method {method!r} in the rows: choose from {listed(groups)}")
    needed = {name: constants(group.points) + 3 for name, group in groups.items()}
    fitted = {name: group for name, group in groups.items() if len(set(group.points)) >= needed[name]}
    for method in methods:
        if method not in fitted:
            raise UserError(
                f"{method} has {len(set(groups[method].points))} runs, and a fit needs {needed[method]}: make more"
            )
    if not fitted:
        raise UserError(f"no method has the {min(needed.values(), default=8)} runs that a fit needs: make more")
    laws = {
        name: _fit(group, hold_out, times, starts) for name, group in fitted.items() if not methods or name in methods
    }
    result = {"files": [str(file) for file in files], "digest": rows_digest(files), "methods": laws}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(output), (json.dumps(result) + "\n").encode())
    return result


def _fit(group: Group, hold_out: float | None, times: int, starts: int) -> dict[str, Any]:
    law = fit_law(group.points, starts=starts)
    drawn = bootstrap(group.points, law, times=times)
    granularity, expansion = varied(group.points)
    data = group.rows[0]["config"]["data"]
    return {
        "constants": asdict(law),
        "intervals": {name: interval([getattr(other, name) for other in drawn]) for name in CONSTANTS},
        "bootstrap": [[float(f"{getattr(other, name):.7g}") for name in CONSTANTS] for other in drawn],
        "runs": len(group.points),
        "error": statistics.fmean(_errors(law, group.points)),
        "held_out": _held_out(group, hold_out, starts),
        "left_out": _left_out_in_turn(group, min(starts, _STARTS_IN_TURN)),
        "varied": {"granularity": granularity, "expansion": expansion},
        "ranges": {
            **{name: _range([getattr(point, name) for point in group.points]) for name in RANGES},
            "experts": _range([point.granularity * point.expansion for point in group.points]),
        },
        "flops": _range([row["summary"]["flops"] for row in group.rows]),
        "model": group.model,
        "vocab_size": data["vocab_size"],
        "context": data["context"],
        "points": [asdict(point) for point in group.points],
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _errors(law: Law, points: Sequence[RunPoint]) -> list[float]:
    """Of each run, how far the law is from its loss, as a share of it."""
    return [abs(expected(law, point) / point.loss - 1) for point in points]


def expected(law: Law, point: RunPoint) -> float:
    """The loss that a law expects of a run."""
    return law.loss(size=point.size, tokens=point.tokens, granularity=point.granularity, expansion=point.expansion)


def _held_out(group: Group, least: float | None, starts: int) -> dict[str, Any] | None:
    """How a fit without the runs of the largest budgets predicts them; None where too few are left to fit.

    Of the sizes among them, `best_size` is the hidden_size that was best, `expected_best_size` the one that was to be.
    """
    flops = [row["summary"]["flops"] for row in group.rows]
    least = 0.9 * max(flops) if least is None else least
    kept = [point for point, spent in zip(group.points, flops, strict=True) if spent < least]
    left_out = [point for point, spent in zip(group.points, flops, strict=True) if spent >= least]
    if not left_out or len(kept) < constants(kept):
        return None
    law = fit_law(kept, starts=starts)
    errors = _errors(law, left_out)
    widths: dict[int, list[RunPoint]] = {}
    for row, point in zip(group.rows, group.points, strict=True):
        if row["summary"]["flops"] >= least:
            widths.setdefault(row["config"]["model"]["hidden_size"], []).append(point)
    return {
        "flops": least,
        "runs": len(left_out),
        "mean": statistics.fmean(errors),
        "worst": max(errors),
        "sizes": sorted(widths),
        "best_size": min(widths, key=lambda width: statistics.fmean(point.loss for point in widths[width])),
        "expected_best_size": min(
            widths, key=lambda width: statistics.fmean(expected(law, point) for point in widths[width])
        ),
    }


def _left_out_in_turn(group: Group, starts: int) -> dict[str, float] | None:
    """How fits without one model each, all its seeds, predict it; None where too few would be left."""
    of_model: dict[tuple[float, ...], list[RunPoint]] = {}
    for point in group.points:
        of_model.setdefault((point.size, point.tokens, point.granularity, point.expansion), []).append(point)
    errors: list[float] = []
    for own in of_model.values():
        kept = [point for point in group.points if point not in own]
        if varied(kept) != varied(group.points) or len(set(kept)) < constants(kept):
            return None
        errors += _errors(fit_law(kept, starts=starts), own)
    return {"mean": statistics.fmean(errors), "worst": max(errors)}


def law_markdown(law: Mapping[str, Any]) -> str:
    """The constants with their intervals, and errors, as a table."""
    methods = law["methods"]
    columns = {"method": list(methods)}
    for name in CONSTANTS:
        if any(fit["constants"][name] for fit in methods.values()):
            columns[name] = [_constant(fit, name) for fit in methods.values()]
    held_out = [fit["held_out"] for fit in methods.values()]
    columns |= {
        "runs": [str(fit["runs"]) for fit in methods.values()],
        "mean error": [f"{fit['error']:.2%}" for fit in methods.values()],
        "of models left out in turn": [_share(fit["left_out"], "mean") for fit in methods.values()],
        "worst of these": [_share(fit["left_out"], "worst") for fit in methods.values()],
        "held out": [
            "" if each is None else f"{each['runs']} runs from {each['flops']:.2g} FLOPs" for each in held_out
        ],
        "mean error there": [_share(each, "mean") for each in held_out],
        "worst": [_share(each, "worst") for each in held_out],
        "best width there, expected": [
            "" if each is None or len(each["sizes"]) < 2 else f"{each['best_size']}, {each['expected_best_size']}"
            for each in held_out
        ],
    }
    return explained(markdown_rows(columns))


def _share(of: Mapping[str, Any] | None, name: str) -> str:
    return "" if of is None else f"{of[name]:.2%}"


def _constant(fit: Mapping[str, Any], name: str) -> str:
    if not fit["constants"][name]:
        return ""
    low, high = fit["intervals"][name]
    return within(fit["constants"][name], low, high, form="{:.3g}", ends="{:.2g}")


def plot_law(law: Mapping[str, Any]) -> Figure:
    """Measured loss over what the law expects: a dot per run, a colour per method, the diagonal."""
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    everything: list[float] = []
    for name, fit in law["methods"].items():
        own = Law(**fit["constants"])
        points = [RunPoint(**point) for point in fit["points"]]
        losses = [point.loss for point in points]
        predictions = [expected(own, point) for point in points]
        axes.plot(predictions, losses, ".", label=name)
        everything += losses + predictions
    axes.plot(_range(everything), _range(everything), color="0.6", linewidth=0.8)
    axes.set(xlabel="loss by the law", ylabel="held-out loss measured")
    axes.legend(frameon=False)
    finish(axes)
    return figure
