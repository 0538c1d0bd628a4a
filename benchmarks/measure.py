"""Time contenders in turn, print what was measured, and keep it as rows of JSON."""

# ruff: noqa: T201, tables on the terminal are what this is for

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from peerlm.ops.cpu import native


def interleave(cases: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each case, run in turn; one round before is not counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def report(part: str, figures: Mapping[str, list[float]], sizes: Mapping[str, object], file: Path | None) -> None:
    """Print a line for each contender, the ratio being to the first; add a row for each to `file`, with `sizes`."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        low, high = min(figures[name]), max(figures[name])
        print(f"| {part} | {name} | {median:.2f} | {low:.2f} .. {high:.2f} | {median / first:.2f} |")
        row = {
            "part": part,
            "contender": name,
            "median": round(median, 4),
            "lowest": round(low, 4),
            "highest": round(high, 4),
            "ratio": round(median / first, 3),
            **sizes,
            "threads": torch.get_num_threads(),
            "kernels": native.description(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": datetime.date.today().isoformat(),
        }
        if file:
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
