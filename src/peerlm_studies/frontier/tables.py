"""The table of a frontier, and in words which setting is best for which cost."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peerlm.errors import listed
from peerlm.train.disturbance import disturbed
from peerlm_studies.frontier.points import MEASURES, Point, front, groups_of
from peerlm_studies.intervals import plus_minus
from peerlm_studies.markdown import markdown_rows


def frontier_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points ready for JSON, with the measures by which each is on the front."""
    leads = _leads(points)
    return [
        {
            **asdict(point),
            "perplexity": point.perplexity,
            "disturbed": disturbed(point.other_cores),
            "front": leads[place],
        }
        for place, point in enumerate(points)
    ]


def frontier_markdown(points: Sequence[Point]) -> str:
    """A table for each budget, what its columns mean, and which settings are best for which bytes."""
    leads = dict(zip(map(id, points), _leads(points), strict=True))
    parts = []
    for budget, own in groups_of(points, "bytes").items():
        parts += [f"At {budget}:", _table(own, [leads[id(point)] for point in own]), _words(own)]
    parts += [
        "KiB/token: parameters that a forward pass of training reads, over its tokens. decoding: KiB that a token "
        "alone reads. MiB: weights and AdamW's moments.",
        "An asterisk: no other setting is both better and cheaper by this, at the same budget or, by seconds, at any. "
        "Costs within 2% count as equal.",
        _seconds_note(points),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(points: Sequence[Point], leads: Sequence[Sequence[str]]) -> str:
    columns = {
        "setting": [point.label for point in points],
        "ppl": [_perplexity(point) for point in points],
        "KiB/token": _cells(points, leads, "bytes"),
        "decoding": _cells(points, leads, "decoding"),
        "MiB": _cells(points, leads, "memory"),
        "seconds": _cells(points, leads, "seconds"),
    }
    return markdown_rows({title: cells for title, cells in columns.items() if any(cells)})


def _cells(points: Sequence[Point], leads: Sequence[Sequence[str]], name: str) -> list[str]:
    """Costs by a measure, with an asterisk on the front."""
    unit = MEASURES[name].unit
    return [
        _number(point.costs[name], unit) + ("*" if name in own else "")
        for point, own in zip(points, leads, strict=True)
    ]


def _leads(points: Sequence[Point]) -> list[list[str]]:
    fronts = {name: [p for own in groups_of(points, name).values() for p in front(own, name)] for name in MEASURES}
    return [[name for name in MEASURES if point in fronts[name]] for point in points]


def _words(points: Sequence[Point]) -> str:
    """The front over bytes of points at one budget; empty where there is nothing to choose."""
    steps = [
        f"from {_number(point.costs['bytes'], 2**10)} KiB {point.label} ({point.perplexity:.1f})"
        for point in front(points, "bytes")
    ]
    return f"Best for the bytes that a token may read: {', '.join(steps)}." if len(points) > 1 and steps else ""


def _seconds_note(points: Sequence[Point]) -> str:
    if all(point.costs["seconds"] is None for point in points):
        return "Seconds are left out: some runs were on a CPU, some on a GPU."
    devices = "; ".join(sorted({f"{p.device}, {p.threads} thread{'s' * (p.threads > 1)}" for p in points}))
    what = "the processor's, over its threads" if all(point.device == "cpu" for point in points) else "the clock's"
    text = f"Seconds are {what} ({devices})."
    if busy := [point.label for point in points if disturbed(point.other_cores)]:
        text += f" Other programs used the machine during {listed(busy)}."
    if unknown := sum(disturbed(point.other_cores) is None for point in points):
        text += f" Whether other programs used it was not measured for {unknown} of {len(points)} settings."
    return text


def _perplexity(point: Point) -> str:
    half = None if point.half_width is None else point.perplexity * point.half_width
    return plus_minus(point.perplexity, half, "{:,.1f}")


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.0f}" if value >= 100 * unit else f"{value / unit:,.3g}"
