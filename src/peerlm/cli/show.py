"""What commands print: tables, JSON, progress."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table


def print_json(value: object) -> None:
    """Print what a machine may read."""
    typer.echo(json.dumps(value, indent=2))


def print_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print named columns, with a row for each key that any of them has."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    table = Table("", *columns, title=title or None, title_justify="left")
    for key in keys:
        table.add_row(key.replace("_", " "), *(_cell(column.get(key, "")) for column in columns.values()))
    Console().print(table)


def transposed(columns: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """These keys as columns, with a row for each column."""
    return {key.replace("_", " "): {name: column[key] for name, column in columns.items()} for key in keys}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_cell(part)}" for key, part in value.items())
    return f"{value:,}" if type(value) is int else str(value)


def advance(bar: Progress, tasks: dict[str, TaskID], name: str, done: int, total: int) -> None:
    """Show how far the work of this name is."""
    if name not in tasks:
        tasks[name] = bar.add_task(name, total=total)
    bar.update(tasks[name], completed=done)
