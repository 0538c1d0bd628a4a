"""How much of the processors other programs use while this one works."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
BUSY = 0.1
"""Cores that other programs may use on average before what was measured meanwhile counts as disturbed."""
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Of a processor's line in STAT: user, nice, system, irq, softirq, steal; not idle and waiting for a disk."""


def disturbed(other_cores: float | None) -> bool | None:
    """Whether other programs used the machine, by the cores that they used on average; None where nobody counted."""
    return None if other_cores is None else other_cores > BUSY


class OtherPrograms:
    """Processor seconds of other programs on the processors that this one may use, by Linux' own count.

    The count is in ticks of a hundredth of a second, so that short spans are rough. Child processes of this one count
    as other programs.
    """

    def __init__(self) -> None:
        self._before = _busy_and_own()

    def since(self) -> float | None:
        """Processor seconds that other programs used since the last call, or the start; None where nobody counts."""
        before, self._before = self._before, _busy_and_own()
        if before is None or self._before is None:
            return None
        return (self._before[0] - before[0]) - (self._before[1] - before[1])


def _busy_and_own() -> tuple[float, float] | None:
    """Busy seconds of all processors that this process may use, and its own."""
    try:
        lines = STAT.read_text().splitlines()
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        fields = [line.split()[1:] for line in lines if line.partition(" ")[0] in usable]
        ticks = sum(int(own[place]) for own in fields for place in _BUSY_FIELDS)
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
    except (OSError, AttributeError, ValueError, IndexError):  # no Linux, or a file of another form
        return None
