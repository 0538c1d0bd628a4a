"""Other programs are counted from the system's own figures, less this process's."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peerlm.train import TrainConfig, disturbance, train
from peerlm.train.disturbance import OtherPrograms


def stat(path: Path, *busy: int) -> None:
    """A file as Linux writes it: ticks of each processor, and a total that must not count twice."""
    lines = ["cpu  999 0 0 0 0 0 0 0 0 0"]
    lines += [f"cpu{number} {ticks} 1 2 5000 6000 3 4 5 700 0" for number, ticks in enumerate(busy)]
    path.write_text("\n".join([*lines, "intr 5 5 5"]))


def test_others_are_busy_ticks_less_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [1.0, 1.5, 1.5]
    monkeypatch.setattr(disturbance, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(time, "process_time", lambda: own.pop(0))
    stat(tmp_path / "stat", 100, 100, 100)
    others = OtherPrograms()
    stat(tmp_path / "stat", 200, 900, 150)  # processor 1 is not ours
    assert others.since() == pytest.approx(1.5 - 0.5)
    assert others.since() == pytest.approx(0.0)


@pytest.mark.parametrize("content", [None, "cpu0 1 2", "cpu0 a b c d e f g h"])
def test_what_nobody_counts_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Callable[..., TrainConfig], content: str | None
) -> None:
    monkeypatch.setattr(disturbance, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    if content is not None:
        (tmp_path / "stat").write_text(content)
    assert OtherPrograms().since() is None
    if content is None:
        assert train(configure(budget={"steps": 1}), progress=False).summary["other_cores"] is None


def test_a_run_says_how_busy_others_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Callable[..., TrainConfig]
) -> None:
    monkeypatch.setattr(OtherPrograms, "since", lambda self: 0.25)
    summary = train(configure(budget={"steps": 2}), progress=False).summary
    assert summary["other_cores"] == pytest.approx(0.5 / summary["seconds"])
