"""The log: rows, TensorBoard, and what is printed."""

import json
import sys
from pathlib import Path

import pytest

from peerlm.train.runlog import Display, RunLog

ROW = {"step": 1, "loss": 2.5, "usage": {"layer": {"share": 0.5}}}


def test_rows_are_lines_and_later_ones_are_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False, log_bytes=0, step=0)
    log.write(ROW)
    kept = log.sync()
    log.write({**ROW, "step": 2})
    log.close()
    again = RunLog(tmp_path, tensorboard=False, log_bytes=kept, step=1)
    again.write({**ROW, "step": 3})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [ROW, {**ROW, "step": 3}]


def test_a_log_that_was_lost_begins_anew(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False, log_bytes=100, step=9)
    log.write(ROW)
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == ROW


def test_tensorboard_gets_every_number_by_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True, log_bytes=0, step=0)
    log.write(ROW)
    log.sync()
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "usage/layer/share"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5)]


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed."""
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


@pytest.mark.usefixtures("without_tensorboard")
def test_without_tensorboard_rows_are_lines_and_what_to_install_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, tensorboard=True, log_bytes=0, step=0)
    log.write(ROW)
    log.sync()
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == ROW
    assert not (tmp_path / "tensorboard").exists()
    assert [record.message for record in caplog.records] == [
        f"log.tensorboard = true, but TensorBoard is not installed: rows are in {tmp_path / 'log.jsonl'} alone; "
        'pip install "peerlm[tensorboard]"'
    ]


@pytest.mark.usefixtures("without_tensorboard")
def test_without_tensorboard_nothing_is_said_where_nobody_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, tensorboard=False, log_bytes=0, step=0)
    log.write(ROW)
    log.close()
    assert not caplog.records


def show(run: Path, *, wanted: bool) -> None:
    with Display(run, wanted=wanted) as display:
        display.step(step=3, progress=0.5, loss=2.5, tokens_per_second=1234.0)
        display.row("a row")
        display.note("a note")


def test_without_a_terminal_rows_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path / "run", wanted=True)
    assert capsys.readouterr() == ("", "a row\na note\n")


def test_nothing_is_shown_when_not_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path / "run", wanted=False)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    show(tmp_path / "run", wanted=True)
    shown = capsys.readouterr().err
    for part in ("run", "50%", "step 3", "loss 2.500", "1,234 tokens/s", "a note"):
        assert part in shown
    assert "a row" not in shown
