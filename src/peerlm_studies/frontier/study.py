"""A frontier from files of rows: its table, JSON and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlm.errors import UserError, listed
from peerlm.files import write_bytes, write_json
from peerlm_studies.figures import save_plot
from peerlm_studies.frontier.figures import plot_frontier
from peerlm_studies.frontier.points import Point, points_of
from peerlm_studies.frontier.tables import frontier_markdown, frontier_rows
from peerlm_studies.rows import read_runs

COSTS = ("seconds", "memory", "decoding")
"""The panels of costs.png of a frontier."""


def frontier(files: Sequence[str | Path], output: str | Path, *, methods: Sequence[str] = ()) -> list[Point]:
    """Draw the frontier of the runs in files of rows; a run that stands in several counts once.

    OUTPUT gets frontier.md, frontier.json, frontier.png (perplexity over bytes read per token) and frontier_costs.png
    (over seconds, memory, and bytes in decoding).

    Args:
        files: rows of `peerlm compare` or `peerlm isoflop`; their losses must be of the same text and windows.
        output: folder.
        methods: only these; empty: all.

    Raises:
        UserError: there is no file, no run, no such method, or losses of other windows or texts among them.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there are no rows at {file}: name a file that peerlm compare or peerlm isoflop wrote")
        rows |= {row["key"]: row for row in read_runs(Path(file))}
    known = dict.fromkeys(row["method"] for row in rows.values())
    for method in methods:
        if method not in known:
            raise UserError(f"there is no method {method!r} in the rows: choose from {listed(known)}")
    chosen = [row for row in rows.values() if not methods or row["method"] in methods]
    if not chosen:
        raise UserError(f"{listed(map(str, files))} has no rows yet: make some with peerlm compare")
    check_alike(chosen)
    points = points_of(chosen)
    write_frontier(Path(output), points)
    return points


def check_alike(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where losses do not compare: of other windows, contexts, vocabularies or texts."""
    kinds = _kinds(rows)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise UserError(
            f"losses of {first!r} and {second!r} do not compare: data.folder, data.vocab_size, data.context and "
            f"eval.final_windows are {one} and {other}; name rows of one study"
        )


def _kinds(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], str]:
    """What losses were measured on, each with the label of a row."""
    kinds: dict[tuple[Any, ...], str] = {}
    for row in rows:
        data, windows = row["config"].get("data") or {}, (row["config"].get("eval") or {}).get("final_windows")
        kinds.setdefault((data.get("folder"), data.get("vocab_size"), data.get("context"), windows), row["label"])
    return kinds


def frontier_of_study(rows: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """Write the frontier of a study's rows into its folder; returns whether there was one to draw.

    There is none of a single setting, of losses that do not compare, or where nothing is known of bytes.
    """
    if len(_kinds(rows)) > 1:
        return False
    points = points_of(rows)
    if len(points) < 2 or all(point.costs["bytes"] is None for point in points):
        return False
    write_frontier(folder, points)
    return True


def write_frontier(folder: Path, points: Sequence[Point]) -> None:
    """Write the table and plots of points into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "frontier.json", frontier_rows(points))
    write_bytes(folder / "frontier.md", frontier_markdown(points).encode())
    save_plot(plot_frontier(points), folder / "frontier.png")
    save_plot(plot_frontier(points, COSTS), folder / "frontier_costs.png")
