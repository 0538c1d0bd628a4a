"""Sections in processes of their own: stopped at their deadline, started again after a crash."""

# ruff: noqa: T201, progress on the terminal is wanted

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rows import DEVICE_LOST, Progress, append
from sections import Section

HERE = Path(__file__).parent
_TO_END = 3.0
"""Seconds between a section's deadline, at which it starts nothing new, and its end by force."""
_LEAST = 5.0
"""Seconds without which no section starts."""
_STARTS = 6
"""How often a section that crashes is started."""


def run_sections(
    sections: Sequence[Section],
    rows: Path,
    *,
    sizes: str,
    every_row: Mapping[str, object],
    seconds: float,
    environment: Mapping[str, str],
) -> None:
    """Run each section; all end within `seconds`.

    Where their limits are more than that in sum, each gets its share; what one leaves over is the next ones'.
    """
    end = time.monotonic() + seconds
    for index, section in enumerate(sections):
        left = end - time.monotonic()
        asked = sum(each.seconds for each in sections[index:])
        limit = section.seconds * min(1.0, left / asked)
        print(f"\n{section.name}: {section.caption} ({limit:.0f} s at most, {max(left, 0):.0f} s left)", flush=True)
        if limit < min(_LEAST, section.seconds):
            append(rows, {"section": section.name, "case": "", "skipped": "time is up", **every_row})
            print("  skipped: time is up", flush=True)
            continue
        _run(section, rows, sizes=sizes, every_row=every_row, limit=limit, environment=environment)


def _run(
    section: Section,
    rows: Path,
    *,
    sizes: str,
    every_row: Mapping[str, object],
    limit: float,
    environment: Mapping[str, str],
) -> None:
    """Run one section; after a crash again, with the cases that come after the one that crashed it."""
    started = time.monotonic()
    progress = Progress(rows)
    progress.clear()
    for start in range(_STARTS):
        left = limit - (time.monotonic() - started)
        if start and left < _LEAST:
            return
        reason, errors, code = _child(section, rows, sizes, every_row, left, environment)
        if not reason:
            return
        if code == DEVICE_LOST:
            continue
        case = progress.current()
        append(rows, {"section": section.name, "case": case, "failed": reason, "errors": errors, **every_row})
        print(f"  {case or section.name}: {reason}", flush=True)
        if not case:
            return
        progress.give_up()


def _child(
    section: Section,
    rows: Path,
    sizes: str,
    every_row: Mapping[str, object],
    seconds: float,
    environment: Mapping[str, str],
) -> tuple[str, str, int | None]:
    """Why the section's process failed, the end of its errors, both empty where it did not; and its exit code."""
    command = [sys.executable, str(HERE / "section.py"), section.name, section.module, section.function]
    command += ["--rows", str(rows), "--sizes", sizes, "--every-row", json.dumps(every_row)]
    command += ["--until", str(time.time() + max(0.0, seconds - _TO_END))]
    log = rows.with_suffix(f".{section.name}.log")
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stderr=errors, env={**os.environ, **environment}, start_new_session=True)
        code: int | None = None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else ""
    if code is None:
        return f"over its deadline of {seconds:.0f} s", last, None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}", last, code
    return (last or f"exit code {code}", last, code) if code else ("", "", 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section's process and those that it started (compilers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot be ended
        process.wait(timeout=_TO_END)
