"""The tables of an isoFLOP study in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from peerlm_studies.intervals import explained, plus_minus
from peerlm_studies.markdown import markdown_rows

PLACES = {
    "inside": "",
    "below": "below the sizes measured",
    "above": "above the sizes measured",
    "no minimum": "no minimum",
    "too few sizes": "too few sizes",
}


def optima_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `optima_table`."""
    files = list(dict.fromkeys(file for row in table for file in row["perplexity"]))
    columns = {
        "FLOPs": [f"{row['flops']:.3g}" for row in table],
        "method": [row["method"] for row in table],
        "optimal active parameters": [_optimum(row) for row in table],
        "loss there": ["" if row["optimum_loss"] is None else f"{row['optimum_loss']:.3f}" for row in table],
        "nearest run": [row["size"] for row in table],
        "seeds": [", ".join(map(str, row["seeds"])) for row in table],
        "loss": [plus_minus(row["loss"], row["loss_half_width"], "{:.3f}") for row in table],
    }
    for file in files:
        cells = [row["perplexity"].get(file, {"mean": None, "half_width": None}) for row in table]
        columns[f"{file} ppl"] = [plus_minus(cell["mean"], cell["half_width"], _form(cell["mean"])) for cell in cells]
    return explained(
        markdown_rows(
            columns
            | {
                "active": [f"{row['active_parameters'] / 1e6:.2f}M" for row in table],
                "parameters": [f"{row['total_parameters'] / 1e6:.2f}M" for row in table],
                "tokens": [f"{row['tokens'] / 1e6:.2f}M" for row in table],
                "seconds": [_cost(row["seconds"], "{:,.0f}") for row in table],
            }
        )
    )


def _optimum(row: Mapping[str, Any]) -> str:
    if row["place"] == "inside":
        return f"{row['optimum_parameters'] / 1e6:.2f}M"
    return PLACES[row["place"]]


def _form(perplexity: float | None) -> str:
    return "{:,.1f}" if perplexity is None or perplexity < 1e5 else "{:.2e}"


def equal_seconds_markdown(table: Mapping[str, Any]) -> str:
    """What `equal_seconds_table` returns."""
    if not table["seconds"]:
        return "No range of seconds was measured for every method.\n"
    columns = {"method": list(table["losses"])}
    for index, seconds in enumerate(table["seconds"]):
        losses = [of_method[index] for of_method in table["losses"].values()]
        columns[f"loss at {seconds:,.0f} s"] = ["" if loss is None else f"{loss:.3f}" for loss in losses]
    return markdown_rows(columns)


def equal_loss_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """What `equal_loss_table` returns."""
    if not table:
        return "No loss was reached by every method.\n"
    return markdown_rows(
        {
            "method": [row["method"] for row in table],
            f"FLOPs to a loss of {table[0]['loss']:.3f}": [_cost(row["flops"], "{:.3g}") for row in table],
            "seconds to it": [_cost(row["seconds"], "{:,.0f}") for row in table],
        }
    )


def _cost(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
