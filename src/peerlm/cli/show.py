"""Show a command's figures: tables, JSON in a file or on stdout, progress."""

import json
from collections.abc import Callable
from pathlib import Path

import typer
from rich.progress import Progress, TaskID

from peerlm.errors import UserError
from peerlm.files import write_bytes

STDOUT = Path("-")
"""Name of a file that stands for stdout."""


def check_file(path: Path | None) -> Path | None:
    """The file that --json names; raises UserError where none can be written there, before the work begins."""
    if path is not None and path != STDOUT and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {path} cannot be written: name a file in a folder that exists, or - for stdout")
    return path


def show(figures: object, json_file: Path | None, tables: Callable[[], object]) -> None:
    """Print figures by `tables`, and write them as JSON too; where the file is stdout they are JSON alone."""
    content = json.dumps(figures, indent=2)
    if json_file == STDOUT:
        typer.echo(content)
        return
    if json_file is not None:
        write_bytes(json_file, f"{content}\n".encode())
    tables()


def advance(bar: Progress, tasks: dict[str, TaskID], name: str, done: int, total: int) -> None:
    """Show how far the work of this name is."""
    if name not in tasks:
        tasks[name] = bar.add_task(name, total=total)
    bar.update(tasks[name], completed=done)
