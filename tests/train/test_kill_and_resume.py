"""SIGKILL at any moment, then --resume, gives the bytes of a run that nothing interrupted.

The number of kills is set by PEERLM_KILLS:

    PEERLM_KILLS=20 python -m pytest tests/train/test_kill_and_resume.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerlm.files import PARTIAL
from peerlm.train import TrainConfig, train
from peerlm.train.checkpoint import list_checkpoints

KILLS = int(os.environ.get("PEERLM_KILLS", "4"))
STEPS_PER_KILL = 40

pytestmark = pytest.mark.slow


def start(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    """`peerlm train`, resuming where there is something to resume."""
    command = [sys.executable, "-m", "peerlm", "train", str(recipe), "--output", str(run), "--json=-", "--resume=auto"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.001)


def untimed(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def kill_while_starting(recipe: Path, run: Path, moments: random.Random) -> None:
    process = start(recipe, run)
    time.sleep(moments.uniform(0, 4))
    kill(process)


def kill_after_a_checkpoint(recipe: Path, run: Path, moments: random.Random) -> None:
    before = list_checkpoints(run)
    process = start(recipe, run)
    wait_until(lambda: list_checkpoints(run) != before, process)
    time.sleep(moments.uniform(0, 0.2))
    kill(process)


def kill_within_a_checkpoint(recipe: Path, run: Path, moments: random.Random) -> None:
    for _ in range(5):
        process = start(recipe, run)
        wait_until(lambda: list(run.glob(f"checkpoints/{PARTIAL}*/model.safetensors")), process)
        kill(process)
        if list(run.glob(f"checkpoints/{PARTIAL}*")):
            return
    pytest.fail("five kills in a row came too late to leave a partial checkpoint")


def test_a_killed_run_ends_as_if_it_had_not_been(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    # A checkpoint every second step, so that kills at random fall into the writing of one, too.
    config = configure(
        run=str(tmp_path / "straight"),
        budget={"steps": STEPS_PER_KILL * KILLS},
        log={"every": 3},
        eval={"every": 50},
        checkpoint={"every": 2},
    )
    straight = train(config, progress=False).run
    recipe, run, moments = straight / "config.json", tmp_path / "killed", random.Random(KILLS)
    kinds = [kill_after_a_checkpoint, kill_while_starting, kill_within_a_checkpoint, kill_after_a_checkpoint]
    for number in range(KILLS):
        kinds[number % len(kinds)](recipe, run, moments)
    last = start(recipe, run)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    for path in (
        "model/model.safetensors",
        f"checkpoints/{list_checkpoints(straight)[-1].name}/optimizer.safetensors",
    ):
        assert (run / path).read_bytes() == (straight / path).read_bytes(), path
    assert untimed(run) == untimed(straight)
    assert not list(run.rglob(PARTIAL + "*"))
