"""SIGTERM and Ctrl-C, held back until a step is finished and the run is saved."""

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Context in which the first SIGTERM or SIGINT is noted in `received`.

    Later ones change nothing, for SLURM, torchrun and a terminal may each send one, and the run is being saved. But a
    process that trains alone is left by a second SIGINT, which acts as it did outside. Handlers exist only in the main
    thread; in another, nothing is held back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former = {number: signal.getsignal(number) for number in self.SIGNALS}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if self.received is None:
            self.received = signal.Signals(number)
            if alone:
                signal.signal(signal.SIGINT, self._former[signal.SIGINT])

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._former.items():
                signal.signal(number, handler)
