"""Commands of peerlm as processes, none of which outlives the one that started them."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType, TracebackType

from peerlm.errors import TrainingStopped


class Processes:
    """Runs `peerlm ...` in processes of their own, from any thread, until the context ends.

    When it ends early the processes are told to stop, which has a training run save a checkpoint. SIGTERM ends it
    early.

    Args:
        jobs: how many run at a time, each with its share of the cores; with one, its progress is shown.
        shown: whether progress is shown at all.
    """

    def __init__(self, *, jobs: int, shown: bool) -> None:
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
            self._before = signal.signal(signal.SIGTERM, _stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, self._before)
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()

    def peerlm(self, *arguments: str) -> tuple[int, str]:
        """Run `peerlm` with these arguments to its end: its exit code, and the last line of stderr if not shown."""
        with self._lock:
            if self._ended:
                return 128 + signal.SIGTERM, ""
            process = subprocess.Popen(
                [sys.executable, "-m", "peerlm", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=None if self._shown else subprocess.PIPE,
                env=self._environment,
            )
            self._running.add(process)
        _, stderr = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, (stderr or b"").decode().strip().rpartition("\n")[2]


def _stop(number: int, frame: FrameType | None) -> None:
    raise TrainingStopped(
        "stopped by SIGTERM; finished runs are kept, and the same command goes on with the others",
        exit_code=128 + number,
    )
