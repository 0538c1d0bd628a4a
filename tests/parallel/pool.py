"""Processes that stand for ranks: started once, joined anew by gloo for each piece of work."""

import multiprocessing.connection
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..processes import server

MOST = 4
_SECONDS = 120
_ROOT = str(Path(__file__).parents[2])


def _serve(rank: int, given: multiprocessing.connection.Connection) -> None:
    """Do pieces of work until there are no more: a function of the rank, the number of ranks, and arguments."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        work = given.recv()
        if work is None:
            return
        function, world, store, arguments = work
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=_SECONDS)
            )
            given.send((function(rank, world, *arguments), None))
        except BaseException:
            given.send((None, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Pool:
    """Up to four ranks."""

    def __init__(self) -> None:
        self._context = server()
        self._ranks: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """What a function of a module gives on each rank; raises RuntimeError with the first rank's traceback."""
        if _ROOT not in sys.path:
            sys.path.append(_ROOT)  # so that children find the tests' modules
        while len(self._ranks) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(len(self._ranks), theirs), daemon=True)
            process.start()
            self._ranks.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            for _, ours in self._ranks[:world]:
                ours.send((function, world, f"{folder}/store", arguments))
            results: dict[int, Any] = {}
            while len(results) < world:
                waiting = {ours: rank for rank, (_, ours) in enumerate(self._ranks[:world]) if rank not in results}
                ready = multiprocessing.connection.wait(list(waiting), timeout=2 * _SECONDS)
                if not ready:
                    self.stop()
                    raise RuntimeError("ranks wait for each other")
                for each in ready:
                    result, error = each.recv()  # type: ignore[union-attr]
                    if error is not None:
                        self.stop()
                        raise RuntimeError(f"rank {waiting[each]}: {error}")  # type: ignore[index]
                    results[waiting[each]] = result  # type: ignore[index]
        return [results[rank] for rank in range(world)]

    def stop(self) -> None:
        """End all processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []
