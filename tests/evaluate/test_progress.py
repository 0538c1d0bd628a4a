"""Progress off a terminal: a line now and then, with speed and time left."""

import io
import sys

import pytest

from peerlm.evaluate import progress
from peerlm.evaluate.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = 0.0
    with progress_bar(shown=True) as bar:
        bar.get_time = lambda: clock
        bar._said = 0.0  # type: ignore[attr-defined]
        task = bar.add_task("reading [1]", total=None)
        for seconds in range(1, 26):
            clock = float(seconds)
            bar.update(task, completed=100 * seconds, total=10_000)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["reading [1]  10%  100/s  90 s left", "reading [1]  20%  100/s  80 s left"]


def test_nothing_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(shown=False) as bar:
        bar.update(bar.add_task("reading", total=3), completed=3)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_bar_with_its_speed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(shown=True) as bar:
        task = bar.add_task("reading", total=1000)
        for done in (10, 500, 1000):
            bar.update(task, completed=done, refresh=True)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "reading" in text
    assert "/s" in text
    assert "100%" in text
