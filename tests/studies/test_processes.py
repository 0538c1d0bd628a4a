"""Commands as processes: told to stop, all end, and what was stopped can be continued."""

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peerlm import UserError
from peerlm.errors import TrainingStopped
from peerlm.ranks import ALONE, MEETING, Ranks
from peerlm_studies import processes
from peerlm_studies.processes import Processes, over_ranks

from ..processes import ranks

CODES = {"train good": (0, 0), "train bad": (75, 3), "eval": (0, 0)}


class Command:
    """A stand-in for a command: its exit code is that of its rank, and it writes down where it meets others."""

    def __init__(self, command: list[str], *, env: dict[str, str], **options: Any) -> None:
        words, rank = " ".join(command[3:]), int(env["RANK"])
        self.returncode = CODES[words][rank]
        self.said = b"" if self.returncode in (0, 75) else b"a line\nthe loss is nan\n"
        with Path(f"commands-{rank}").open("a") as file:
            file.write(json.dumps([words, env["WORLD_SIZE"], env.get(MEETING)]) + "\n")

    def communicate(self) -> tuple[None, bytes]:
        return None, self.said


def study(of_ranks: Ranks) -> list[tuple[int, str]]:
    with Processes(jobs=1, shown=False, ranks=of_ranks) as commands:
        good = commands.on_all_ranks("train", "good")
        return [good, commands.peerlm("eval"), commands.on_all_ranks("train", "bad")]


def be_a_rank(folder: Path) -> None:
    os.chdir(folder)
    stand_in: Any = SimpleNamespace(Popen=Command, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
    processes.subprocess = stand_in
    print(json.dumps(over_ranks(study, shown=False)))  # noqa: T201


def test_ranks_run_the_commands_that_the_first_one_starts_and_say_what_failed(tmp_path: Path) -> None:
    with ranks(2, tmp_path / "ranks", be_a_rank, tmp_path) as started:
        assert started.wait() == [0, 0], started.said()
    first, second = (json.loads(said) for said in started.said())
    assert first == [[0, ""], [0, ""], [3, "the loss is nan"]]
    assert second is None
    of_first, of_second = (
        [json.loads(line) for line in (tmp_path / f"commands-{rank}").read_text().splitlines()] for rank in range(2)
    )
    (_, _, meeting), alone, (_, _, other) = of_first
    assert of_second == [["train good", "2", meeting], ["train bad", "2", other]]
    assert meeting != other
    assert alone == ["eval", "1", None]


def test_processes_that_train_together_make_one_run_at_a_time() -> None:
    two = Ranks(rank=0, world_size=2, device=ALONE.device)
    with pytest.raises(UserError, match=r"compare\.jobs = 3: the 2 processes of torchrun make one run after another"):
        Processes(jobs=3, shown=False, ranks=two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_exit_code_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(TrainingStopped, match=f"stopped by {number.name}; finished runs are kept") as stop,
        Processes(jobs=1, shown=False),
    ):
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
