"""Rows of a run: log.jsonl, TensorBoard, and what the user sees while it trains."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)


class RunLog:
    """Appends rows to RUN/log.jsonl and, if asked, RUN/tensorboard.

    Args:
        run: the run's folder.
        tensorboard: whether to write there too; where TensorBoard is not installed, that is said and not done.
        log_bytes: how much is kept of an older log.jsonl; what follows is of steps that will be taken again.
        step: steps taken so far.
    """

    def __init__(self, run: Path, *, tensorboard: bool, log_bytes: int, step: int) -> None:
        path = run / "log.jsonl"
        path.touch()
        os.truncate(path, min(log_bytes, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        self._writer = _tensorboard(run / "tensorboard", purge_step=step + 1) if tensorboard else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, which has a "step"; TensorBoard gets its numbers, nested ones as a/b."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _numbers(row):
                if name != "step":
                    self._writer.add_scalar(name, value, row["step"])

    def sync(self) -> int:
        """Put every row on the disk; returns the length of log.jsonl in bytes."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()
        return self._file.tell()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, *, purge_step: int) -> Any:
    """A writer of TensorBoard's files; None where it is not installed, which is said."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "tensorboard":
            raise
        _log.warning(
            "log.tensorboard = true, but TensorBoard is not installed: rows are in %s alone; pip install "
            '"peerlm[tensorboard]"',
            folder.with_name("log.jsonl"),
        )
        return None
    return SummaryWriter(folder, purge_step=purge_step)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers.append((prefix + name, value))
    return numbers


class Display:
    """What the user sees on stderr: a bar on a terminal, lines elsewhere, nothing when not wanted."""

    def __init__(self, run: Path, *, wanted: bool) -> None:
        console = Console(stderr=True)
        self._bar = None
        self._lines = wanted and not console.is_terminal
        if wanted and console.is_terminal:
            columns = (
                TextColumn(run.name),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, *, step: int, progress: float, loss: float, tokens_per_second: float) -> None:
        """After each step: `progress` is the share of the budget that is spent."""
        if self._bar is not None:
            text = f"step {step:,}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=progress, description=text)

    def row(self, text: str) -> None:
        """Something worth a line where there is no bar."""
        if self._lines:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def note(self, text: str) -> None:
        """Something worth a line above the bar as well."""
        if self._bar is not None:
            self._bar.console.print(text)
        self.row(text)
