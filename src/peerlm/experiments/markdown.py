"""Columns to a table in Markdown."""

from collections.abc import Mapping, Sequence


def markdown_rows(columns: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown from its columns, each a title and its cells."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n"
