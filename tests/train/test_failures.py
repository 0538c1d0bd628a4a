"""Whatever ends one of several ranks ends all: with one message, a code, and the last good checkpoint whole.

The number of runs that must end by themselves is set by PEERLM_ENDS:

    PEERLM_ENDS=20 python -m pytest tests/train/test_failures.py -k end_without
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peerlm.cli import main
from peerlm.files import PARTIAL, write_json
from peerlm.optim import saved
from peerlm.parallel import storage
from peerlm.train import TrainConfig, loop
from peerlm.train.checkpoint import list_checkpoints, read_state
from peerlm.train.recipe import to_dict

from ..processes import Processes, ranks

ENDS = int(os.environ.get("PEERLM_ENDS", "1"))


def nothing(rank: int) -> None:
    """No failure."""


def fail(rank: int) -> None:
    """A bug on one rank, at its third step."""
    in_step(rank, 3, lambda: 1 / 0)


def hang(rank: int) -> None:
    in_step(rank, 3, lambda: time.sleep(1000))


def gradients_that_are_no_numbers(rank: int) -> None:
    accumulate = loop.accumulate_gradients
    steps = iter(range(1, 100))

    def accumulate_nan(model: torch.nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = accumulate(model, *arguments, **options)
        return loss * torch.nan if rank == 1 and next(steps) == 4 else loss

    loop.accumulate_gradients = accumulate_nan


def full_disk_at_one(rank: int) -> None:
    """The disk of rank 1 is full when it writes its second shard."""
    fail_at_save(2 if rank == 1 else None)


def full_disk_at_main(rank: int) -> None:
    """The disk of rank 0, which writes the checkpoints of tables that are whole, is full at the second one."""
    fail_at_save(2)


def fail_at_save(number: int | None) -> None:
    saves = iter(range(1, 100))

    def save_while_there_is_room(*arguments: Any, **options: Any) -> None:
        if next(saves) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*arguments, **options)

    storage.save_file = saved.save_file = save_while_there_is_room


def two_signals(rank: int) -> None:
    """SIGTERM in a step, and again while the run is saved."""
    if rank == 1:
        return
    in_step(rank + 1, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def save_and_be_told_again(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save_file(*arguments)

    storage.save_file = save_and_be_told_again


def in_step(rank: int, number: int, act: Callable[[], object]) -> None:
    """Let rank 1 do something at the beginning of a step."""
    seed_step = loop.seed_step

    def act_and_seed(seed: int, step: int, rank_: int) -> None:
        if rank == 1 and step == number - 1:
            act()
        seed_step(seed, step, rank_)

    loop.seed_step = act_and_seed


def run(failure: Callable[[int], None], recipe: Path) -> None:
    failure(int(os.environ["RANK"]))
    main(["train", str(recipe), "--json", "-", "--resume=auto"])


@pytest.fixture
def train(configure: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., Any]:
    """A function: a failure -> two ranks that train with checkpoints at every second step."""

    def start(failure: Callable[[int], None], **changes: Any) -> Any:
        often = {"data": {"micro_batch_size": None}, "checkpoint": {"every": 2}, "eval": {"every": 0}}
        config = configure(**{**often, "parallel": {"rows": 2}, **changes})
        write_json(tmp_path / "recipe.json", to_dict(config))
        return ranks(2, tmp_path / "ranks", run, failure, tmp_path / "recipe.json")

    return start


def lines(processes: Processes) -> list[str]:
    return [line for text in processes.said() for line in text.splitlines()]


def last_step(run: Path) -> int:
    assert not list((run / "checkpoints").glob(PARTIAL + "*"))
    return read_state(list_checkpoints(run)[-1]).step


@pytest.mark.parametrize(
    ("failure", "sharded", "exit_codes", "step", "message"),
    [
        (gradients_that_are_no_numbers, True, [3, 3], 2, "training stopped at step 4: the loss is nan"),
        (full_disk_at_one, True, [2, 2], 2, "error: the disk of"),
        (full_disk_at_main, False, [2, 2], 2, "error: the disk of"),
        (two_signals, True, [143, 143], 3, "stopped by SIGTERM after step 3"),
    ],
)
def test_all_ranks_stop_with_one_message(
    train: Callable[..., Any],
    tmp_path: Path,
    failure: Callable[[int], None],
    sharded: bool,
    exit_codes: list[int],
    step: int,
    message: str,
) -> None:
    with train(failure, **({} if sharded else {"parallel": {}})) as processes:
        assert processes.wait() == exit_codes, processes.said()
    told = [line for line in lines(processes) if not line.startswith("Resume with")]
    assert len(told) == 1, told
    assert told[0].startswith(message)
    assert last_step(tmp_path / "run") == step


def flip_a_byte(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_shard_that_is_damaged_ends_all_ranks_that_resume_and_names_it(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    with train(nothing, budget={"steps": 4}) as processes:
        assert processes.wait() == [0, 0], processes.said()
    (tmp_path / "run" / "summary.json").unlink()
    older, newest = list_checkpoints(tmp_path / "run")
    for damage in (flip_a_byte, Path.unlink):
        damage(newest / "rank-00001.safetensors")
        with train(nothing, budget={"steps": 4}) as processes:
            assert processes.wait() == [2, 2], processes.said()
        (told,) = lines(processes)
        assert told.startswith("error: ")
        assert "rank-00001.safetensors" in told
        assert older.name in told  # which one to resume from


def test_a_bug_on_one_rank_shows_its_traceback_alone(train: Callable[..., Any], tmp_path: Path) -> None:
    with train(fail) as processes:
        assert processes.wait() == [75, 1], processes.said()
    quiet, traceback = processes.said()
    assert quiet == ""
    assert "ZeroDivisionError: division by zero" in traceback
    assert last_step(tmp_path / "run") == 2


def test_a_rank_that_hangs_ends_all_and_shows_where(train: Callable[..., Any], tmp_path: Path) -> None:
    with train(hang, watchdog_minutes=2 / 60) as processes:
        codes = processes.wait()
    assert set(codes) <= {70, 75}, processes.said()
    assert codes[1] == 70
    assert sum("training stopped: no step was finished in 2 s" in line for line in lines(processes)) == 1
    assert "in act_and_seed" in processes.said()[1]
    assert last_step(tmp_path / "run") == 2


def test_a_killed_rank_ends_the_others(train: Callable[..., Any], tmp_path: Path) -> None:
    with train(nothing, budget={"steps": 100_000}) as processes:
        deadline = time.monotonic() + 60
        while not list_checkpoints(tmp_path / "run"):
            assert time.monotonic() < deadline, processes.said()
            time.sleep(0.01)
        processes.processes[0].kill()
        assert processes.wait() == [-signal.SIGKILL, 75], processes.said()
    said = processes.said()[1]
    assert said.startswith("training stopped: another process of the run ended or was killed; the last good checkpoint")
    assert len(said.splitlines()) == 2
    assert last_step(tmp_path / "run") >= 2


def test_finished_ranks_end_without_a_hang(train: Callable[..., Any], tmp_path: Path) -> None:
    for number in range(ENDS):
        with train(nothing, budget={"steps": 2}, run=str(tmp_path / f"run{number}")) as processes:
            assert processes.wait() == [0, 0], processes.said()
        assert "Traceback" not in "".join(processes.said())
