"""SIGKILL of any process at any moment, then --resume=auto, gives the bytes of a run that nothing interrupted.

The number of kills is set by PEERLM_KILLS:

    PEERLM_KILLS=20 python -m pytest tests/train/test_kill_and_resume.py
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peerlm.cli import main
from peerlm.files import PARTIAL
from peerlm.train import TrainConfig
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import TablesConfig
from peerlm.train.recipe import to_dict

from ..processes import Processes, ranks

KILLS = int(os.environ.get("PEERLM_KILLS", "2"))
STEPS_PER_KILL = 18

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "alone, tables in files": (1, {"optim": {"tables": "lazy"}}),
    "two ranks, tables sharded": (2, {"parallel": {"rows": 2}}),
    "two ranks, saved in the background": (2, {"checkpoint": {"every": 2, "background": True}}),
}
"""How many processes train, and what the recipe says of them."""


def run_to_its_end(recipe: Path, run: Path) -> None:
    main(["train", str(recipe), "--output", str(run), "--json=-", "--resume=auto"])


def end(processes: Processes, victim: int) -> None:
    """Kill one of the ranks, upon which the others end by themselves."""
    processes.processes[victim].kill()
    codes = processes.wait()
    assert codes[victim] == -signal.SIGKILL, ("the run ended before it was killed", processes.said())
    assert all(code == 75 for rank, code in enumerate(codes) if rank != victim), (codes, processes.said())


def wait_until(condition: Callable[[], object], processes: Processes) -> None:
    while not condition():
        assert all(each.exitcode is None for each in processes.processes), processes.said()
        time.sleep(0.001)


OF_A_PROCESS = ("seconds", "tokens_per_second", "load", "received_bytes_per_token")
"""What rows say of the process that wrote them, since its last row or its start."""


def untimed(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in OF_A_PROCESS} for row in rows]


def kill_while_starting(processes: Processes, run: Path, moments: random.Random, victim: int) -> bool:
    """Any moment of the first ones, in which ranks may not have met; torchrun ends the others then."""
    time.sleep(moments.uniform(0, 1))
    for process in (processes.processes[victim], *processes.processes):
        process.kill()
    return True


def kill_after_a_checkpoint(processes: Processes, run: Path, moments: random.Random, victim: int) -> bool:
    before = list_checkpoints(run)
    wait_until(lambda: list_checkpoints(run) != before, processes)
    time.sleep(moments.uniform(0, 0.2))
    end(processes, victim)
    return True


def kill_within_a_checkpoint(processes: Processes, run: Path, moments: random.Random, victim: int) -> bool:
    """Returns whether the kill came in time: a partial checkpoint was there, and is left where rank 0 was killed.

    One that an earlier kill has left is there from the start, when ranks may not have met.
    """
    left = files_in_partial_checkpoints(run)
    wait_until(lambda: files_in_partial_checkpoints(run) - left, processes)
    end(processes, victim)
    return victim > 0 or bool(files_in_partial_checkpoints(run) - left)


def files_in_partial_checkpoints(run: Path) -> set[tuple[str, int]]:
    """Which they are, and when they were written."""
    found = set()
    for path in run.glob(f"checkpoints/{PARTIAL}step-*/*.safetensors"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    layout: str, configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    count, settings = LAYOUTS[layout]
    # A checkpoint every second step, so that kills at random fall into the writing of one, too.
    changes = {"data": {"micro_batch_size": None}, "log": {"every": 3}, "eval": {"every": 20}}
    config = configure(
        **{"budget": {"steps": STEPS_PER_KILL * KILLS}, "checkpoint": {"every": 2}, **changes, **settings}
    )
    straight, run, moments = tmp_path / "straight", tmp_path / "killed", random.Random(KILLS)
    recipes = {}
    for each in (straight, run):
        tables = TablesConfig(folder=f"{each}-rows" if "in files" in layout else "")
        recipes[each] = tmp_path / f"{each.name}.json"
        recipes[each].write_text(json.dumps(to_dict(replace(config, tables=tables))))
    recipe = recipes[run]
    with ranks(count, tmp_path / "ranks", run_to_its_end, recipes[straight], straight) as processes:
        assert processes.wait(60 * (1 + KILLS)) == [0] * count, processes.said()
    kinds = [kill_within_a_checkpoint, kill_after_a_checkpoint, kill_within_a_checkpoint, kill_while_starting]
    for number in range(KILLS):
        for _ in range(5):
            with ranks(count, tmp_path / "ranks", run_to_its_end, recipe, run) as processes:
                if kinds[number % len(kinds)](processes, run, moments, moments.randrange(count)):
                    break
        else:
            pytest.fail("five kills in a row came too late to leave a partial checkpoint")
    with ranks(count, tmp_path / "ranks", run_to_its_end, recipe, run) as processes:
        assert processes.wait(60 * (1 + KILLS)) == [0] * count, processes.said()
    tables, killed_tables = tmp_path / "straight-rows", tmp_path / "killed-rows"
    for path in tables.rglob("*.safetensors"):
        assert (killed_tables / path.relative_to(tables)).read_bytes() == path.read_bytes()
    names = sorted(str(path.relative_to(straight)) for path in straight.rglob("*.safetensors"))
    assert len(names) > 2
    for name in names:
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert untimed(run) == untimed(straight)
    assert not list(run.rglob(PARTIAL + "*"))
