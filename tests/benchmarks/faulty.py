"""Sections that fail in every way that a GPU knows."""

import os
import signal
import time
from typing import Any

import torch


def cases(report: Any) -> None:
    """One case is wrong, one is out of memory, one loses the device, one ends the process; the last is measured."""

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nmore")

    def illegal_access() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    report.attempt("wrong", lambda: torch.ones(2) @ torch.ones(3), tokens=7)
    report.attempt("large", out_of_memory)
    report.attempt("loses the device", illegal_access)
    report.check("ends the process", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    report.time("timed", {"one": lambda: lambda turn: None, "two": lambda: lambda turn: time.sleep(1e-3)}, traffic=8)


def before_any_case(report: Any) -> None:
    """Fails outside of all cases."""
    raise RuntimeError("no card to be found")


def hangs(report: Any) -> None:
    """Never ends."""
    report.row("before", ok=True)
    report.attempt("waits", lambda: time.sleep(600))
