"""Memory of a table that dominates, on one process and cut over several: peak of each rank, and of all together.

    python benchmarks/sharded_memory.py                        # 16,777,216 experts of width 16, on 1 and on 4 processes
    python benchmarks/sharded_memory.py --experts 1048576 --dim 256 --processes 1 4 --json rows.jsonl

Every count of processes trains the same language model on the same batches of the embedded corpus, by `peerlm.train`'s
own steps and exact RowAdamW. Peaks are those that Linux keeps (VmHWM), Python and PyTorch included. What all processes
need together is the largest sum of their proportional shares (PSS), sampled: pages of libraries count once.

Processes start as torchrun's do, each with Python and PyTorch of its own. With --start forkserver they are forked from
one that has imported all, which counts as well, so that they share what none of them writes to.
"""

# ruff: noqa: T201, a table on the terminal is what this is for

import argparse
import datetime
import json
import multiprocessing.forkserver
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

MIB = 2**20
PRELOADED = ["peerlm.data", "peerlm.train.build", "peerlm.train.feed", "peerlm.train.loop", "torch.distributed.fsdp"]


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def shared_out(processes: list[int]) -> int:
    """Bytes of these processes together, each page once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def recipe(experts: int, dim: int, tokens: int, folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """A language model of two blocks, one of which has the table."""
    peer = {"num_experts": experts, "heads": 8, "experts_per_head": 16, "key_dim": 32}
    return {
        "run": str(folder / "run"),
        "data": {
            "folder": str(folder / "data"),
            "sources": ["demo"],
            "vocab_size": 1024,
            "context": 64,
            "batch_size": tokens // 64,
        },
        "budget": {"steps": 1000},
        "model": {
            "hidden_size": dim,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "ffw_layers": ["dense", "peer"],
            "peer": peer,
        },
        "optim": {"tables": "exact", "learning_rate": 3e-3},
        "parallel": parallel,
    }


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Tokenize the text, in a process of its own, whose memory is none of the ranks'."""
    from peerlm.train import TrainConfig
    from peerlm.train.build import prepare_data
    from peerlm.train.recipe import from_dict

    config = from_dict(TrainConfig, recipe(options.experts, options.dim, options.tokens, folder, {}))
    prepare_data(config.data, progress=False)


def train(rank: int, world: int, store: str, values: dict[str, Any], steps: int, out: Path) -> None:
    """Be a rank: some steps, and what they took."""
    torch.set_num_threads(1)
    import torch.distributed as dist

    from peerlm.data import batches
    from peerlm.ranks import Ranks
    from peerlm.train import TrainConfig
    from peerlm.train.build import build_training, open_data
    from peerlm.train.checkpoint import TrainState
    from peerlm.train.feed import Feed
    from peerlm.train.loop import take_step
    from peerlm.train.recipe import from_dict

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    config = from_dict(TrainConfig, values)
    ranks = Ranks(rank=rank, world_size=world, device=torch.device("cpu"))
    windows, _ = open_data(config.data, ranks, progress=False)
    before = memory_bytes("VmRSS")
    training = build_training(config, ranks, windows)
    training.hooks = ()
    built = memory_bytes("VmHWM")
    size = config.data.batch_size // world
    feed = Feed.to(
        ranks.device, batches(windows, batch_size=size, seed=config.seed, position=0, rank=rank, world_size=world)
    )
    state, losses = TrainState(), []
    for _ in range(steps):
        state, _ = take_step(training, state, feed, training.budget.next_progress(state.step, state.seconds))
        losses.append(training.measures.newest["loss"])
    found = {
        "before_bytes": before,
        "built_bytes": built,
        "peak_bytes": memory_bytes("VmHWM"),
        "losses": [round(losses[0], 5), round(losses[-1], 5)],
    }
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    training.unwrap()
    dist.destroy_process_group()


def measured(world: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What so many processes take."""
    parallel = {"rows": options.rows or world, "cols": world // (options.rows or world)}
    values = recipe(options.experts, options.dim, options.tokens, folder, parallel)
    out = folder / f"out{world}"
    out.mkdir()
    multiprocessing.set_forkserver_preload(PRELOADED)
    context: Any = torch.multiprocessing.start_processes(
        train,
        (world, str(out / "store"), values, options.steps, out),
        nprocs=world,
        join=False,
        start_method=options.start,
    )
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    together, started = 0, time.perf_counter()
    while not context.join(timeout=0.2):
        together = max(together, shared_out([*(each.pid for each in context.processes), *([server] if server else [])]))
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    return {
        "processes": world,
        "start": options.start,
        "mesh": f"{parallel['cols']} x {parallel['rows']}",
        "experts": options.experts,
        "dim": options.dim,
        "tokens_per_step": options.tokens,
        "steps": options.steps,
        "peak_bytes": [each["peak_bytes"] for each in ranks],
        "built_bytes": [each["built_bytes"] for each in ranks],
        "before_bytes": [each["before_bytes"] for each in ranks],
        "together_bytes": together,
        "losses": ranks[0]["losses"],
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4096**2)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of a step, over all processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--start", choices=("spawn", "forkserver"), default="spawn")
    parser.add_argument("--rows", type=int, help="cut rows over so many of the processes, and columns over the others")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    options = parser.parse_args()
    first: dict[str, Any] = {}
    print(
        "| processes | peak of a rank, MiB | of the first | all together, MiB | of the first | loss, first and last |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        prepared = torch.multiprocessing.get_context("spawn").Process(target=prepare, args=(options, Path(folder)))
        prepared.start()
        prepared.join()
        for world in options.processes:
            row = measured(world, options, Path(folder))
            first = first or row
            peak = max(row["peak_bytes"])
            row["ratio"] = round(peak / max(first["peak_bytes"]), 4)
            row["ratio_together"] = round(row["together_bytes"] / first["together_bytes"], 4)
            print(
                f"| {world} | {peak / MIB:,.0f} | {row['ratio']} | {row['together_bytes'] / MIB:,.0f} | "
                f"{row['ratio_together']} | {row['losses'][0]} {row['losses'][1]} |",
                flush=True,
            )
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
