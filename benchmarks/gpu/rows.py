"""The file of rows, lines of JSON, each on disk as soon as it is known; and how far a section is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(file: Path, row: Mapping[str, object]) -> None:
    """Append a line of JSON; it is on disk afterwards."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


DEVICE_LOST = 3
"""Exit code of a section whose device answers no more; the case has its row, and the others need a new process."""


class Progress:
    """What a section is at, in two files beside the rows: whoever finds its process dead can start it again.

    A case is known by its name and its figures.
    """

    def __init__(self, rows: Path):
        self._current, self._done = rows.with_suffix(".current"), rows.with_suffix(".done")

    def clear(self) -> None:
        """Nothing has begun."""
        self._current.write_text("", encoding="utf-8")
        self._done.write_text("", encoding="utf-8")

    def begin(self, case: str, figures: Mapping[str, object]) -> None:
        """This case runs now; an empty name: none."""
        self._current.write_text(_key(case, figures) if case else "", encoding="utf-8")

    def current(self) -> str:
        """The name of the case that runs; empty where none does."""
        return self._current.read_text(encoding="utf-8").partition("\t")[0]

    def end(self, case: str, figures: Mapping[str, object]) -> None:
        """This case has its row."""
        with self._done.open("a", encoding="utf-8") as lines:
            lines.write(_key(case, figures) + "\n")

    def give_up(self) -> None:
        """The case that runs counts as done."""
        with self._done.open("a", encoding="utf-8") as lines:
            lines.write(self._current.read_text(encoding="utf-8") + "\n")

    def is_done(self, case: str, figures: Mapping[str, object]) -> bool:
        """Whether this case has its row."""
        return _key(case, figures) in self._done.read_text(encoding="utf-8").splitlines()


def _key(case: str, figures: Mapping[str, object]) -> str:
    return f"{case}\t{json.dumps(figures, sort_keys=True, default=str)}"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, those of a run that was cut off in the middle of a line included but for that line."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
