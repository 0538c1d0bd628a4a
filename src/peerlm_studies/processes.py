"""Commands of peerlm as processes, none of which outlives the one that started them."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TypeVar

import torch.distributed as dist

from peerlm.errors import RankLost, TrainingStopped, UserError
from peerlm.ranks import ALONE, MEETING, Ranks, join_ranks

T = TypeVar("T")


class Processes:
    """Runs `peerlm ...` in processes of their own, from any thread, until the context ends.

    When it ends early the processes are told to stop, which has a training run save a checkpoint. SIGTERM and Ctrl-C
    end it early.

    Args:
        jobs: how many run at a time, each with its share of the cores; with one, its progress is shown.
        shown: whether progress is shown at all.
        ranks: processes that torchrun has started, of which this is one; see `over_ranks`.

    Raises:
        UserError: several jobs of several ranks, which would have to meet each other.
    """

    def __init__(self, *, jobs: int, shown: bool, ranks: Ranks = ALONE) -> None:
        if jobs > 1 and ranks.world_size > 1:
            raise UserError(
                f"compare.jobs = {jobs}: the {ranks.world_size} processes of torchrun make one run after another; set "
                "it to 1"
            )
        self._ranks = ranks
        self._shown = shown and jobs == 1
        self._environment = dict(os.environ)
        if jobs > 1:
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Processes":
        self._handles_sigterm = threading.current_thread() is threading.main_thread()
        if self._handles_sigterm:
            self._before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handles_sigterm:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()

    def peerlm(self, *arguments: str) -> tuple[int, str]:
        """Run `peerlm` with these arguments to its end: its exit code, and the last line of stderr if not shown."""
        return self._run(arguments, {"WORLD_SIZE": "1"})

    def on_all_ranks(self, *arguments: str) -> tuple[int, str]:
        """As `peerlm`, by all ranks together, of which the others are in `over_ranks`; where one fails, what it says.

        The first rank calls it.
        """
        if self._ranks.world_size == 1:
            return self.peerlm(*arguments)
        if self._ended:
            return 128 + signal.SIGTERM, ""
        meeting = uuid.uuid4().hex
        _tell(self._ranks, (meeting, arguments))
        return self._together(meeting, arguments)

    def follow(self) -> None:
        """Be another rank than the first one: run what it runs, until it has made all."""
        while (told := _tell(self._ranks, None)) is not None:
            self._together(*told)

    def _together(self, meeting: str, arguments: Sequence[str]) -> tuple[int, str]:
        own = self._run(arguments, {MEETING: meeting, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        of_ranks: list[tuple[int, str]] = [own] * self._ranks.world_size
        dist.all_gather_object(of_ranks, own, group=self._ranks.files)
        failed = [each for each in of_ranks if each[0]]
        return min(failed, key=lambda each: each[0] == RankLost.exit_code, default=own)

    def _run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        with self._lock:
            if self._ended:
                return 128 + signal.SIGTERM, ""
            process = subprocess.Popen(
                [sys.executable, "-m", "peerlm", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=None if self._shown else subprocess.PIPE,
                env={**self._environment, **environment},
            )
            self._running.add(process)
        _, stderr = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, (stderr or b"").decode().strip().rpartition("\n")[2]


def over_ranks(study: Callable[[Ranks], T], *, shown: bool) -> T | None:
    """Make a study, over the processes that torchrun has started where there are several.

    The first one makes all of it. The others take part in each command that it runs `on_all_ranks`, and do no more.

    Args:
        study: given the ranks, for `Processes`.
        shown: whether progress is shown.

    Returns:
        What `study` gives; None on other ranks than the first.
    """
    with join_ranks("cpu") as ranks:
        if ranks.is_main:
            result = study(ranks)
            if ranks.world_size > 1:
                _tell(ranks, None)
            return result
        with Processes(jobs=1, shown=shown, ranks=ranks) as processes:
            processes.follow()
        return None


def _tell(ranks: Ranks, command: tuple[str, Sequence[str]] | None) -> tuple[str, Sequence[str]] | None:
    """What the first rank gives: where a command's processes meet, with its arguments; or None, no more come."""
    told = [command]
    dist.broadcast_object_list(told, src=0, group=ranks.files)
    return told[0]


def _stop(number: int, frame: FrameType | None) -> None:
    raise TrainingStopped(
        f"stopped by {signal.Signals(number).name}; finished runs are kept",
        exit_code=128 + number,
    )
