"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


def progress_bar(*, shown: bool) -> Progress:
    """Each task's name, how far it is, its speed, and the time left; nothing with `shown` false."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Speed(), TimeRemainingColumn())
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        return _Lines(console=console, disable=True)
    return Progress(*columns, console=console, disable=not shown)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_speed(task), style="progress.data.speed")


class _Lines(Progress):
    """A line about a task where the last one is some time ago."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._said = self.get_time()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.get_time() - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = self.get_time()
        task = self.tasks[self.task_ids.index(task_id)]
        left = "" if task.time_remaining is None else f"{task.time_remaining:,.0f} s left"
        parts = (task.description, f"{task.percentage:.0f}%", _speed(task), left)
        self.console.print("  ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)


def _speed(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return "" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"
