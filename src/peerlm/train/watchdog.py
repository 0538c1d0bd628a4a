"""A thread that ends the process where a step takes so long that it must hang."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType

from peerlm.errors import RankLost
from peerlm.ranks import has_failed, is_first_to_fail, note_failure

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
_LOOK_EVERY = 5.0
"""Seconds between two looks, or less where less is allowed."""
_GRACE = 30.0
"""Seconds that a step may last after another rank has failed, which it should notice by itself."""


class Watchdog:
    """Context in which a step may take so many seconds: then all threads' stacks are printed, and the process ends.

    It ends with exit code 70, or with 75 and no stacks where another rank has failed before. It ends at once, as no
    handler runs in a thread that hangs.

    Args:
        seconds: that a step may take; 0: any number, and nothing is watched.
        advice: gives the rest of the message: where the run stands.
    """

    def __init__(self, seconds: float, advice: Callable[[], str]) -> None:
        self._seconds, self._advice = seconds, advice
        self._step_began: float | None = None
        self._failure_seen: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of one step."""
        self._step_began, self._failure_seen = monotonic(), None
        try:
            yield
        finally:
            self._step_began = None

    def _watch(self) -> None:
        while not self._done.wait(min(_LOOK_EVERY, self._seconds / 4)):
            began = self._step_began
            if began is None:
                continue
            if monotonic() - began > self._seconds:
                self._end()
            if has_failed():
                self._failure_seen = self._failure_seen or monotonic()
                if monotonic() - self._failure_seen > _GRACE:
                    os._exit(RankLost.exit_code)

    def _end(self) -> None:
        note_failure()
        if is_first_to_fail():
            print(  # noqa: T201, the process ends here
                f"training stopped: no step was finished in {self._seconds:g} s (watchdog_minutes); {self._advice()}",
                file=sys.stderr,
            )
        faulthandler.dump_traceback()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
