"""A stage's checkpoints by time, under a clock of the test's own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peerlm.continual import LearnConfig, learn
from peerlm.train import loop
from peerlm.train.checkpoint import list_checkpoints


class Killed(BaseException):
    """What no code catches, as when the process ends."""


def live_by(monkeypatch: pytest.MonkeyPatch, *, minutes_per_step: float, dies_at: int | None = None) -> None:
    """Let each step take that long by the loop's clock, and the step with this number, counted from 0, die."""
    now, take_step = [0.0], loop.take_step

    def timed(training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == dies_at:
            raise Killed
        now[0] += 60 * minutes_per_step
        return take_step(training, state, *arguments)

    monkeypatch.setattr(loop, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "take_step", timed)


@pytest.mark.parametrize("method", ["full", "grow"])
def test_a_killed_stage_resumes_from_a_checkpoint_by_time_to_the_same_bits(
    method: str, configure: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sub_keys": 2} if method == "grow" else {}
    straight = configure(method=method, settings=settings, optim={"tables": "exact"}, only=1, checkpoint_minutes=0.0)
    learn(straight, progress=False)
    killed = replace(straight, run=straight.run + "-killed", checkpoint_minutes=5.0)
    with monkeypatch.context() as patch:
        live_by(patch, minutes_per_step=3.0, dies_at=3)
        with pytest.raises(Killed):
            learn(killed, progress=False)
    stage = Path(killed.run) / "stages/1-code"
    assert [folder.name for folder in list_checkpoints(stage)] == ["step-00000002"]
    learn(killed, resume=True, progress=False)
    model = "stages/1-code/model/model.safetensors"
    assert (Path(killed.run) / model).read_bytes() == (Path(straight.run) / model).read_bytes()


def test_a_resumed_stream_may_change_when_it_saves(configure: Callable[..., LearnConfig]) -> None:
    config = configure(budget={"steps": 1}, only=1)
    assert config.checkpoint_minutes == 5
    rows = learn(config, progress=False)
    assert learn(replace(config, checkpoint_minutes=1.0), resume=True, progress=False) == rows
