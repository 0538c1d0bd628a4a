"""Checkpoints by time, under a clock of the test's own: when they are written, and that no weight depends on it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerlm.train import TrainConfig, loop, train
from peerlm.train.checkpoint import list_checkpoints

Configure = Callable[..., TrainConfig]
MANY = {"peer": {"num_experts": 1024, "heads": 2, "experts_per_head": 2, "key_dim": 8}}


class Killed(BaseException):
    """What no code catches, as when the process ends."""


class Clock:
    """Stands still but for `minutes_per_step`, and notes after which steps there was a new checkpoint."""

    def __init__(self, minutes_per_step: float, dies_at: int | None = None) -> None:
        self.now, self.minutes_per_step, self.dies_at = 1000.0, minutes_per_step, dies_at
        self.saved: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def take_step(self, training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == self.dies_at:
            raise Killed
        self.now += 60 * self.minutes_per_step
        return take_step(training, state, *arguments)

    def save(self, training: Any, state: Any) -> Any:
        self.saved.append(state.step)
        return save(training, state)


take_step, save = loop.take_step, loop.save


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Clock]:
    """Lets the loop live by a clock."""

    def patch(clock: Clock) -> Clock:
        for name in ("monotonic", "take_step", "save"):
            monkeypatch.setattr(loop, name, getattr(clock, name))
        return clock

    return patch


def weights(run: str) -> bytes:
    return (Path(run) / "model" / "model.safetensors").read_bytes()


def losses(run: str) -> list[float]:
    return [json.loads(line).get("loss") for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("every", "minutes", "minutes_per_step", "expected"),
    [
        (0, 5.0, 2.0, [3, 6, 8]),  # the last is that of the end
        (0, 5.0, 5.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (0, 5.0, 0.5, [8]),
        (0, 0.0, 100.0, [8]),
        (0, math.inf, 100.0, [8]),
        (4, 5.0, 2.0, [3, 4, 7, 8]),  # time counts from the last checkpoint, whatever it was due by
    ],
)
def test_a_checkpoint_is_written_at_the_latest_after_so_many_minutes(
    every: int,
    minutes: float,
    minutes_per_step: float,
    expected: list[int],
    configure: Configure,
    under: Callable[[Clock], Clock],
) -> None:
    clock = under(Clock(minutes_per_step))
    train(configure(checkpoint={"every": every, "minutes": minutes}), progress=False)
    assert clock.saved == expected


def test_by_default_a_kill_costs_five_minutes(configure: Configure) -> None:
    assert configure(checkpoint={}).checkpoint.minutes == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": {"tables": "exact"}},
        {"optim": {"tables": "lazy"}},
        {"optim": {"tables": "dense"}},
        {"optim": {"tables": "fused", "table_clip": math.inf}, "data": {"micro_batch_size": 4}},
        {"grow": {"at": "34@40%", "opening": 0.3, "freeze": ["rows"]}, "optim": {"tables": "exact"}},
    ],
    ids=["exact", "lazy", "dense", "fused", "growth"],
)
def test_no_weight_depends_on_checkpoints_by_time(
    settings: dict[str, Any], configure: Configure, tmp_path: Path, under: Callable[[Clock], Clock]
) -> None:
    settings = {"model": MANY, "budget": {"steps": 11}, "checkpoint": {"every": 0}, **settings}
    never, always, killed = (configure(run=str(tmp_path / name), **settings) for name in ("never", "always", "killed"))
    under(Clock(0.0))
    train(never, progress=False)
    under(Clock(9.0))
    train(always, progress=False)
    assert weights(always.run) == weights(never.run)
    under(Clock(2.0, dies_at=7))
    with pytest.raises(Killed):
        train(killed, progress=False)
    assert [folder.name for folder in list_checkpoints(Path(killed.run))] == ["step-00000003", "step-00000006"]
    under(Clock(0.0))
    train(killed, resume=True, progress=False)
    assert weights(killed.run) == weights(never.run)
    assert losses(killed.run) == losses(never.run)
