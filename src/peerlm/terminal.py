"""What commands print: tables that fit the terminal, in a column or a row for each subject, or a block for each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Subject = tuple[str, Mapping[str, Any]]
"""What a table speaks of: a name, and its quantities."""
VALUE = "value"
"""Name of the one subject of a table that is a list of quantities."""


def print_table(
    title: str, subjects: Mapping[str, Mapping[str, Any]], console: Console | None = None, *, rows: bool = False
) -> None:
    """Print subjects and their quantities, none of them cut short.

    Args:
        title: above the table.
        subjects: by name, their quantities by name; a subject may lack some.
        console: where to; default: stdout.
        rows: whether to prefer a row for each subject to a column for each. Where that is wider than the terminal the
            other is taken, and where both are, a block for each subject.
    """
    _print(title, list(subjects.items()), console or Console(), rows=rows)


def print_markdown(text: str, console: Console | None = None) -> None:
    """Print Markdown of paragraphs, headings and tables; tables as `print_table` does, a row for each subject."""
    console = console or Console()
    for block in re.split(r"\n{2,}", text.strip()):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            _print("", list(_subjects_of(lines)), console, rows=True)
        else:
            console.print(Text(" ".join(lines).replace("**", "").replace("`", "")))
        console.print()


def _print(title: str, subjects: Sequence[Subject], console: Console, *, rows: bool) -> None:
    if title:
        console.print(Text(title))
    if [name for name, _ in subjects] == [VALUE]:
        console.print(_list_of(subjects[0][1]))
        return
    unlimited = console.options.update(max_width=10_000)
    for table in (_table(subjects, rows=rows), _table(subjects, rows=not rows)):
        if Measurement.get(console, unlimited, table).maximum <= console.width:
            console.print(table)
            return
    for name, quantities in subjects:
        console.print(Text(name))
        console.print(_list_of({key: value for key, value in quantities.items() if value != ""}))


def _table(subjects: Sequence[Subject], *, rows: bool) -> Table:
    keys = list(dict.fromkeys(key for _, quantities in subjects for key in quantities))
    if rows:
        table = _empty(["", *map(_label, keys)])
        for name, quantities in subjects:
            table.add_row(_text(name), *(_text(_cell(quantities.get(key, ""))) for key in keys))
    else:
        table = _empty(["", *(name for name, _ in subjects)])
        for key in keys:
            table.add_row(_text(_label(key)), *(_text(_cell(each.get(key, ""))) for _, each in subjects))
    return table


def _list_of(quantities: Mapping[str, Any]) -> Table:
    """A block: quantities one below another."""
    table = _empty(["", ""])
    table.show_header = False
    for key, value in quantities.items():
        table.add_row(_text(_label(key)), _text(_cell(value)))
    return table


def _empty(headers: Sequence[str]) -> Table:
    table = Table()
    for header in headers:
        table.add_column(_text(header), overflow="fold")
    return table


def _text(text: str) -> Text:
    """Text as it is: names may look like rich's markup."""
    return Text(text)


def _label(key: str) -> str:
    """A key in words; other text, such as one with the name of a file, stays."""
    return key.replace("_", " ") if key.isidentifier() else key


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return "\n".join(
            f"{key}: {', '.join(f'{name} {_cell(each)}' for name, each in part.items())}"
            if isinstance(part, dict)
            else f"{key}: {_cell(part)}"
            for key, part in value.items()
        )
    return f"{value:,}" if type(value) is int else str(value)


def _subjects_of(lines: Sequence[str]) -> Iterator[Subject]:
    """The rows of a table in Markdown; as many first cells are a row's name as tell rows apart."""
    header, _, *body = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines
    ]
    named = next(
        (count for count in range(1, len(header)) if len({tuple(row[:count]) for row in body}) == len(body)), 1
    )
    for row in body:
        yield ", ".join(row[:named]), dict(zip(header[named:], row[named:], strict=True))
