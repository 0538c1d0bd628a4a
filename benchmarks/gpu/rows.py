"""The file of rows: lines of JSON, each on disk as soon as it is known; and the name of the case that runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(file: Path, row: Mapping[str, object]) -> None:
    """Append a line of JSON; it is on disk afterwards."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def note_current(rows: Path, case: str) -> None:
    """Leave the name of the case that runs for whoever finds this process dead."""
    current_file(rows).write_text(case, encoding="utf-8")


def current_file(rows: Path) -> Path:
    """Where `note_current` leaves it."""
    return rows.with_suffix(".current")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, those of a run that was cut off in the middle of a line included but for that line."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
