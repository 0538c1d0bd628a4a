"""Results as rows of JSON lines: each is appended whole, so that a comparison killed at any moment resumes."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from peerlm.errors import UserError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file in order, none where it does not exist; a last line cut short by a kill is left out.

    Raises:
        UserError: a line in the middle is not JSON; the message has its number.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}, is not a row of JSON: {error.msg}; delete the line") from error
    return rows


def read_runs(path: Path) -> list[dict[str, Any]]:
    """As `read_rows`, of rows that `peerlm compare` or `peerlm isoflop` wrote; raises UserError where one is not."""
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"key", "method", "seed", "config", "summary"} <= row.keys():
            raise UserError(
                f"{path}, row {number}, is of no training run: name a file that peerlm compare or peerlm isoflop wrote"
            )
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, whole and synced to disk; what a kill left of a line is cut off first, unless it is a whole row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        whole = _is_row(last)
        if not whole:
            file.truncate(file.tell() - len(last))
        file.write(b"\n" * whole + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_row(line: bytes) -> bool:
    """Whether `read_rows` counts this last line, which ends without a newline, as a row."""
    try:
        return bool(line) and json.loads(line) is not None
    except ValueError:
        return False


def machine_and_date() -> dict[str, Any]:
    """What a row says of where and when it was made: `machine` and `date` (UTC)."""
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def provenance() -> dict[str, Any]:
    """As `machine_and_date`, with the threads of this process."""
    row = machine_and_date()
    return {**row, "machine": {**row["machine"], "threads": torch.get_num_threads()}}
