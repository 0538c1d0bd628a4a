"""Times of several contenders, taken in turn."""

import statistics
import time
from collections.abc import Callable

import torch

Case = Callable[[int], object]
"""Does once what is timed; its argument is the round, by which it rotates its inputs."""


class Timer:
    """Milliseconds of calls on one device.

    On a GPU they are those between two events, after a write that empties the L2 cache: it also keeps the card busy
    while Python launches what is timed, so that short work is not measured as launches.
    """

    def __init__(self, device: str):
        self.gpu = device == "cuda"
        if self.gpu:
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26)
            self._sweep = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device=device)

    def once(self, case: Case, turn: int) -> float:
        """Milliseconds of one call."""
        if not self.gpu:
            started = time.perf_counter()
            case(turn)
            return 1e3 * (time.perf_counter() - started)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sweep.zero_()
        before.record()
        case(turn)
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.gpu:
            torch.cuda.synchronize()


def interleaved(
    timer: Timer,
    cases: dict[str, Case],
    *,
    rounds: int,
    seconds: float,
    starts: Callable[[str], object],
    failed: Callable[[str, BaseException], None],
) -> dict[str, list[float]]:
    """Milliseconds of each case, in turn: `rounds` of them, or as many as `seconds` hold.

    `starts` hears the name of the case that runs, and an empty one at the end. A case that raises is reported to
    `failed` and left out from then on.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    until = time.monotonic() + seconds
    for turn in range(rounds):
        if turn and time.monotonic() > until:
            break
        for name in list(times):
            starts(name)
            try:
                times[name].append(timer.once(cases[name], turn))
            except Exception as error:
                del times[name]
                failed(name, error)
    starts("")
    return times


def summary(times: list[float]) -> dict[str, float | int]:
    """Median, lowest, highest, and how many."""
    return {
        "ms": round(statistics.median(times), 5),
        "lowest": round(min(times), 5),
        "highest": round(max(times), 5),
        "rounds": len(times),
    }
