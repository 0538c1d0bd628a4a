"""Processes for tests, and ranks that torchrun could have started, from one that has imported all there is to import.

A server forks them, so that each starts within milliseconds. The test hosts their store, as torchrun's agent does.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .disk import check_descriptor

PRELOADED = [
    "peerlm.cli",
    "peerlm.growth",
    "peerlm.parallel",
    "peerlm.testing",
    "peerlm.train",
    "pydantic.type_adapter",
    "torch.distributed.checkpoint",
    "torch.profiler",
]


@dataclass
class Processes:
    """Ranks that run one function, whose stdout and stderr are in a file each."""

    outputs: list[Path]
    processes: list[ForkServerProcess] = field(default_factory=list)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes, once all have ended; None for one that has not by then."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        """What each rank wrote to stdout and stderr."""
        return [path.read_text() for path in self.outputs]


@contextmanager
def ranks(count: int, folder: Path, function: Callable[..., object], *arguments: Any) -> Iterator[Processes]:
    """Start `function(*arguments)` as that many ranks; those that still run at the end of the context are killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    started = Processes([folder / f"rank-{rank}.txt" for rank in range(count)])
    try:
        for rank, output in enumerate(started.outputs):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            values = {key: str(value) for key, value in (numbers | place).items()}
            started.processes.append(start(output, values, function, *arguments))
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def server() -> ForkServerContext:
    """Of this process there is one, whoever asks first: all that tests fork has been imported in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(
    output: Path, environment: dict[str, str], function: Callable[..., object], *arguments: Any
) -> ForkServerProcess:
    """Start `function(*arguments)` in a process.

    What it writes to stdout and then to stderr goes to the file `output`, its environment is ours but for these values.
    """
    context = server()
    forkserver._forkserver.ensure_running()  # type: ignore[attr-defined]
    process = context.Process(
        target=_run, args=(_address(), os.environ | environment, Path.cwd(), output, function, arguments)
    )
    process.start()
    return process


def run(
    output: Path, environment: dict[str, str], function: Callable[..., object], *arguments: Any
) -> tuple[int | None, str]:
    """As `start`, to its end: the exit code and what it wrote."""
    process = start(output, environment, function, *arguments)
    process.join()
    return process.exitcode, output.read_text()


def run_module(name: str, arguments: list[str]) -> None:
    """What `python -m NAME ARGUMENTS...` does."""
    sys.argv[1:] = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _address() -> dict[str, Any]:
    """Where the server is, by the names that its clients know this by."""
    known = vars(forkserver._forkserver)  # type: ignore[attr-defined]
    return {name: known[name] for name in ("_forkserver_address", "_forkserver_authkey") if name in known}


def _run(
    address: dict[str, Any],
    environment: dict[str, str],
    folder: Path,
    output: Path,
    function: Callable[..., object],
    arguments: Any,
) -> None:
    # What this process starts comes from the same server; Python would begin another one, which imports all again.
    client = forkserver._forkserver  # type: ignore[attr-defined]
    vars(client).update(address, ensure_running=lambda: None)
    os.environ.clear()  # the server has the variables and the folder of its first caller
    os.environ |= environment
    os.chdir(folder)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = check_descriptor
    function(*arguments)
