"""Columns to a table in Markdown."""

from collections.abc import Iterable, Mapping, Sequence


def markdown_rows(columns: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown from its columns, each a title and its cells; bars in these are escaped."""
    lines = [_line(columns), "|---" * len(columns) + "|"]
    lines += [_line(cells) for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells) + " |"
