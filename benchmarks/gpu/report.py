"""The rows of one section: measured under a deadline, on disk at once, failures and lack of memory among them."""

# ruff: noqa: T201, progress on the terminal is wanted

import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from rows import DEVICE_LOST, Progress, append
from sizes import Sizes
from timing import Case, Timer, interleaved, summary

Result = TypeVar("Result")


class SkippedError(Exception):
    """Raised where a case cannot be measured here, and that is no failure; the message says why."""


class Report:
    """Where a section measures and writes.

    Args:
        section: its name.
        rows: the file that rows are appended to, as lines of JSON.
        sizes: the shapes.
        every_row: what is said in each row: the machine, the commit.
        until: when the section ends, as `time.time()` counts.
    """

    def __init__(
        self,
        section: str,
        rows: Path,
        sizes: Sizes,
        every_row: Mapping[str, object],
        *,
        until: float,
    ):
        self.section = section
        self.rows = rows
        self.sizes = sizes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.timer = Timer(self.device)
        self._every_row = every_row
        self._until = until
        self._progress = Progress(rows)
        self._first: dict[tuple[object, ...], tuple[str, float]] = {}

    def left(self) -> float:
        """Seconds until the section's deadline."""
        return self._until - time.time()

    def row(self, case: str, **figures: object) -> None:
        """Append one row, and say it on the terminal."""
        append(self.rows, {"section": self.section, "case": case, **figures, **self._every_row})
        print(f"  {case}: {_shown(figures)}", flush=True)

    def attempt(self, case: str, run: Callable[[], Result], **figures: object) -> Result | None:
        """What `run` gives; None, and a row that says why, where it fails or there is no time left for it.

        Nothing is done, and the answer is None, where the case has its row from before the section crashed.
        """
        if self._progress.is_done(case, figures):
            return None
        if self.left() <= 0:
            self._end(case, figures, skipped="time is up")
            return None
        self._progress.begin(case, figures)
        try:
            return run()
        except SkippedError as reason:
            self._end(case, figures, skipped=str(reason))
        except Exception as error:
            self._failed(case, error, figures)
        finally:
            self._progress.begin("", {})
        self.give_back()
        return None

    def check(self, case: str, run: Callable[[], Mapping[str, object]], **figures: object) -> None:
        """One row of a check: `run` gives its figures, "ok" among them."""
        found = self.attempt(case, run, **figures)
        if found is not None:
            self._end(case, figures, **found)
        self.give_back()

    def time(
        self,
        case: str,
        contenders: Mapping[str, Callable[[], Case]],
        *,
        traffic: int = 0,
        flops: int = 0,
        rounds: int | None = None,
        seconds: float = 8,
        **figures: object,
    ) -> None:
        """One row for each contender, timed in turn.

        Ratios are times as a share of the first's, also of an earlier call with the same case and figures.

        Args:
            case: what is timed.
            contenders: by name, what builds it and gives what is timed.
            traffic: bytes that each must move at least; gives TB/s.
            flops: gives TFLOP/s.
            rounds: how often each is timed, at most; by default as the sizes say.
            seconds: how long all of them may take, besides building and two calls each.
            figures: the same in each row.
        """
        cases: dict[str, Case] = {}
        facts: dict[str, dict[str, object]] = {}
        for name, build in contenders.items():
            self._warm(f"{case} / {name}", name, build, cases, facts, figures)
        times = interleaved(
            self.timer,
            cases,
            rounds=rounds or self.sizes.rounds,
            seconds=max(0.0, min(seconds, self.left())),
            starts=lambda name: self._progress.begin(
                f"{case} / {name}" if name else "", {"contender": name, **figures}
            ),
            failed=lambda name, error: self._failed(f"{case} / {name}", error, {"contender": name, **figures}),
        )
        del cases
        self.give_back()
        for name, each in times.items():
            found = summary(each)
            first, least = self._first.setdefault((case, *sorted(figures.items())), (name, found["ms"]))
            more: dict[str, object] = {"ratio": round(found["ms"] / least, 4), "ratio_to": first} if least else {}
            if traffic and found["ms"]:
                more["TB_per_s"] = round(traffic / found["ms"] / 1e9, 4)
            if flops and found["ms"]:
                more["TFLOP_per_s"] = round(flops / found["ms"] / 1e9, 2)
            self._end(f"{case} / {name}", {"contender": name, **figures}, **found, **more, **facts[name])

    def _warm(
        self,
        full: str,
        name: str,
        build: Callable[[], Case],
        cases: dict[str, Case],
        facts: dict[str, dict[str, object]],
        figures: Mapping[str, Any],
    ) -> None:
        """Build a contender and call it twice: the first call compiles, of the second the memory is measured."""

        def warmed() -> bool:
            case = build()
            started = time.perf_counter()
            case(0)
            self.timer.synchronise()
            facts[name] = {"first_call_s": round(time.perf_counter() - started, 3), **self._memory_of(case)}
            cases[name] = case
            return True

        self.attempt(full, warmed, contender=name, **figures)

    def _memory_of(self, case: Case) -> dict[str, object]:
        if self.device != "cuda":
            case(1)
            return {}
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case(1)
        self.timer.synchronise()
        peak = torch.cuda.max_memory_allocated()
        return {"working_GiB": round((peak - held) / 2**30, 3), "peak_GiB": round(peak / 2**30, 3)}

    def give_back(self) -> None:
        """Give the card's memory back that nobody holds."""
        if self.device != "cuda":
            return
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # after an illegal access nothing works any more
            raise _lost(error) from error

    def _end(self, case: str, figures: Mapping[str, Any], **found: object) -> None:
        """The row of a case, which is then done."""
        self.row(case, **found, **figures)
        self._progress.end(case, figures)

    def _failed(self, case: str, error: BaseException, figures: Mapping[str, Any]) -> None:
        memory = isinstance(error, torch.OutOfMemoryError)
        reason = {"out_of_memory": True} if memory else {}
        self._end(case, figures, failed=_first_line(error), **reason)
        if is_fatal(error):
            raise _lost(error)


def _lost(error: BaseException) -> SystemExit:
    print(f"the device is lost: {_first_line(error)}", file=sys.stderr)
    return SystemExit(DEVICE_LOST)


def is_fatal(error: BaseException) -> bool:
    """Whether a CUDA error left the process without a device, as an illegal access does."""
    text = str(error)
    return any(
        each in text for each in ("illegal memory access", "misaligned address", "device-side assert", "launch failure")
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _shown(figures: Mapping[str, object]) -> str:
    left_out = ("contender", "lowest", "highest", "rounds", "ratio_to")
    return ", ".join(f"{name} {value}" for name, value in figures.items() if name not in left_out)
