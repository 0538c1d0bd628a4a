"""Processes that stand for ranks, joined by gloo for one piece of work."""

import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..processes import server

_SECONDS = 120
_ROOT = str(Path(__file__).parents[2])


def _work(
    rank: int,
    world: int,
    store: str,
    results: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Do a piece of work: a function of the rank, the number of ranks, and arguments."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=_SECONDS)
        )
        result = function(rank, world, *arguments), None
    except BaseException:
        result = None, traceback.format_exc()
    results.send_bytes(pickle.dumps(result))  # whole tensors: their memory ends with this process
    if dist.is_initialized():
        dist.destroy_process_group()


def together(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What a function of a module gives on each rank; raises RuntimeError with the first rank's traceback.

    Ranks are new processes: torch's caches keep every mesh of a process, and with it the threads of its groups, which
    wake a hundred times a second.
    """
    if _ROOT not in sys.path:
        sys.path.append(_ROOT)  # so that children find the tests' modules
    context = server()
    ranks: dict[multiprocessing.connection.Connection, tuple[int, Any]] = {}
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(rank, world, f"{folder}/store", theirs, function, arguments), daemon=True
                )
                process.start()
                theirs.close()
                ranks[ours] = rank, process
            while len(results) < world:
                waiting = [ours for ours, (rank, _) in ranks.items() if rank not in results]
                ready = multiprocessing.connection.wait(waiting, timeout=2 * _SECONDS)
                if not ready:
                    raise RuntimeError("ranks wait for each other")
                for each in ready:
                    rank = ranks[each][0]  # type: ignore[index]
                    try:
                        results[rank], error = pickle.loads(each.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        error = "it ended without a result"
                    if error is not None:
                        raise RuntimeError(f"rank {rank}: {error}")
            for _, process in ranks.values():
                process.join(_SECONDS)
        finally:
            for _, process in ranks.values():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]
