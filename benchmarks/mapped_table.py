"""Train and serve tables in mapped files: step times beside tables in memory, cache hits, and the bits after SIGKILL.

python benchmarks/mapped_table.py --folder /tmp/mapped [--experts 67108864 --row-dim 64 --cache "4 GB"]

Each measurement becomes a line of JSON in FOLDER/rows.jsonl; those that are there are not made again. The default is
small enough for any machine. Files of tables take 4 bytes for each of experts * row_dim, and are deleted with --delete.
"""

# ruff: noqa: T201, a line on the terminal is what this is for

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peerlm.evaluate.loading import load_model
from peerlm.layers import ExpertTable
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in, mapped_tables
from peerlm.layers.table import tables_as
from peerlm.optim import RowAdamW
from peerlm.ranks import join_ranks
from peerlm.train import TrainConfig
from peerlm.train.build import build_training, open_data
from peerlm.train.checkpoint import TrainState, save_model
from peerlm.train.config import TablesConfig
from peerlm.train.loop import fit, last_state
from peerlm.train.recipe import from_dict
from peerlm.train.run_folder import open_run
from peerlm.train.tables import close_tables
from peerlm.train.training import Hook, Training

LOOKED_UP = 128
"""Rows of a token."""


def main() -> None:
    """Measure what is missing, print all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=1 << 16)
    parser.add_argument("--row-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", default="64 MB")
    parser.add_argument("--zipf-experts", type=int, default=1 << 15)
    parser.add_argument("--zipf-cache", default="8 MB", help="for the last of the table's own measurements")
    parser.add_argument("--delete", action="store_true", help="files of tables and of the run, afterwards")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(configuration(options), options.folder / "steps.jsonl")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = options.folder / "rows.jsonl"
    done = {json.loads(line)["name"] for line in rows.read_text().splitlines()} if rows.is_file() else set()
    for name, measure in (
        ("train", lambda: trained(options)),
        ("serve", lambda: served(options)),
        ("zipf in memory", lambda: zipf(options, None)),
        ("zipf in files", lambda: zipf(options, "")),
        ("zipf in files, small cache", lambda: zipf(options, options.zipf_cache)),
    ):
        if name not in done:
            row = {"name": name, **measure(), "torch": torch.__version__, "threads": torch.get_num_threads()}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(rows.read_text())
    if options.delete:
        for name in ("rows", "run", "zipf"):
            shutil.rmtree(options.folder / name, ignore_errors=True)


def zipf(options: argparse.Namespace, cache: str | None) -> dict[str, Any]:
    """Steps of one table: 1,024 tokens look 128 rows up each, the row of rank r with a probability like 1 / r.

    cache: None for a table in memory; "" for files without a bound.
    """
    torch.manual_seed(0)
    count, dim = options.zipf_experts, options.row_dim
    place = None
    if cache is None:
        table = ExpertTable(count, dim, row_format="bfloat16")
    else:
        place = RowPlace(options.folder / "zipf", cache=TablesConfig(cache=cache).cache_bytes)
        with tables_as(mapped_in(place)):
            table = ExpertTable(count, dim, row_format="bfloat16")
    optimizer = RowAdamW(table.parameters(), lr=1e-3, betas=(0.0, 0.99), lazy=True, row_wise=True)
    seconds, hits = [], []
    for _ in range(min(options.steps, 30) + 5):
        rank = (count ** torch.rand(1024, LOOKED_UP, dtype=torch.float64)).long().clamp_(max=count - 1)
        ids = rank * 2654435761 % count  # neighbours in rank lie anywhere
        x, weights = torch.randn(1024, dim), torch.rand(1024, LOOKED_UP)
        if place is not None:
            hits.append(share_in_memory(place, ids))
        started = time.perf_counter()
        table(x, weights, ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    found = {
        "experts": count,
        "row_dim": dim,
        "cache": cache,
        "median step s": round(statistics.median(seconds[5:]), 4),
        "sum": float(table.read().detach().double().sum()),
    }
    if place is not None:
        found["resident MB"] = round(place.resident_bytes() / 1e6)
        place.close()
        shutil.rmtree(place.folder)
    return found | ({"share of rows in memory when looked up": round(statistics.mean(hits[5:]), 4)} if hits else {})


def share_in_memory(place: RowPlace, ids: torch.Tensor) -> float:
    """Of the distinct rows looked up, how many the page cache has."""
    file = place.stores[0].files["rows"]
    pages = (ids.unique() * file.row_bytes + 4096) // 4096
    return float(file._resident(0, 4096 + file.num_bytes)[pages].float().mean())


def configuration(options: argparse.Namespace) -> TrainConfig:
    """A language model with one large layer, its table in files."""
    folder = options.folder
    return from_dict(
        TrainConfig,
        {
            "run": str(folder / "run"),
            "data": {
                "folder": str(folder / "data"),
                "sources": ["demo"],
                "vocab_size": 4096,
                "context": 256,
                "batch_size": 2,
            },
            "model": {
                "hidden_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffw_layers": ["dense", "peer"],
                "max_position_embeddings": 256,
                "peer": {
                    "num_experts": options.experts,
                    "heads": 8,
                    "experts_per_head": 16,
                    "key_dim": 128,
                    "row_dim": options.row_dim,
                    "row_format": "bfloat16",
                },
            },
            "budget": {"steps": options.steps},
            "optim": {"learning_rate": 3e-3, "tables": "lazy", "table_beta1": 0.0, "table_row_wise": True},
            "eval": {"every": 0, "final_windows": 4},
            "checkpoint": {"every": max(1, options.steps // 4), "minutes": 0, "keep": 1},
            "log": {"every": 1},
            "tables": {"folder": str(folder / "rows"), "cache": options.cache},
        },
    )


class Meter(Hook):
    """Writes what each step has cost the process."""

    def __init__(self, path: Path) -> None:
        self.file, self.before = path.open("a"), counters()

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """One line of JSON."""
        now = counters()
        (table,) = mapped_tables(training.model).values()
        gradient = table.rows.grad
        assert gradient is not None
        row = {name: round(now[name] - self.before[name], 4) for name in now} | {
            "pid": os.getpid(),
            "step": state.step,
            "loss": state.train_loss,
            "rows": gradient._indices().shape[1],
            **memory(),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.before = counters()
        return state


def counters() -> dict[str, float]:
    """Seconds, reads that waited for the disk, bytes read and written."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "s": time.perf_counter(),
        "disk reads": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "MB read": int(io["read_bytes"]) / 1e6,
        "MB written": int(io["write_bytes"]) / 1e6,
    }


def memory() -> dict[str, int]:
    """Megabytes of the process: its own, and of mapped files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    names = {"RssAnon:": "own MB", "RssFile:": "files MB"}
    return {names[line[0]]: int(line[1]) // 1000 for line in lines if line[0] in names}


def work(config: TrainConfig, path: Path) -> None:
    """From the newest checkpoint, or the start, to the end."""
    started = time.perf_counter()
    with join_ranks("cpu") as ranks:
        windows, _ = open_data(config.data, ranks, progress=False)
        training = build_training(config, ranks, windows, Meter(path))
        open_run(config)
        state = last_state(training)
        with path.open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), "ready s": round(time.perf_counter() - started, 1)}) + "\n")
        with training.reporting(state, progress=False):
            state = fit(training, state)
            begun = time.perf_counter()
            with ranks.atomic_folder(training.folder / "model") as folder:
                save_model(folder, training.weights, training.tokenizer)
        with path.open("a") as file:
            row = {"checkpoints s": state.checkpoint_seconds, "export s": time.perf_counter() - begun}
            file.write(json.dumps({"pid": os.getpid(), **row}) + "\n")
        close_tables(training.model)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of the worker."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """Train, killed once between two checkpoints; compare the losses of the steps that were made twice."""
    path, kill_at = options.folder / "steps.jsonl", options.steps // 2 + max(2, options.steps // 10)
    command = [sys.executable, *sys.argv, "--worker"]
    killed = any("killed" in row for row in read(path))
    while not any("export s" in row for row in read(path)):
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(0.05)
            if not killed and any(row.get("step", 0) >= kill_at for row in read(path)):
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed = True
                with path.open("a") as file:
                    file.write(json.dumps({"killed": process.pid}) + "\n")
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(process.returncode)
    rows = read(path)
    steps = [row for row in rows if "step" in row]
    by_step: dict[int, list[float]] = {}
    for row in steps:
        by_step.setdefault(row["step"], []).append(row["loss"])
    twice = [losses for losses in by_step.values() if len(losses) > 1]
    logs = list((options.folder / "rows").rglob("undo-*.log"))
    return {
        "experts": options.experts,
        "parameters of the table": options.experts * 2 * options.row_dim,
        "GB of files": round(sum(each.stat().st_blocks * 512 for each in files(options.folder / "rows")) / 1e9, 2),
        "GB of logs": round(sum(each.stat().st_size for each in logs) / 1e9, 3),
        "cache": options.cache,
        "steps": max(by_step),
        "median step s": statistics.median(row["s"] for row in steps),
        "median step s by quarter": [
            statistics.median(row["s"] for row in part) for part in quarters(sorted(steps, key=lambda row: row["step"]))
        ],
        "rows of a step": statistics.median(row["rows"] for row in steps),
        "reads that waited, over rows": statistics.median(row["disk reads"] / row["rows"] for row in steps),
        "MB read a step": statistics.median(row["MB read"] for row in steps),
        "most own MB": max(row["own MB"] for row in steps),
        "most MB of files": max(row["files MB"] for row in steps),
        "first loss": by_step[1][0],
        "last loss": by_step[max(by_step)][0],
        "steps made twice around SIGKILL": len(twice),
        "all losses of these equal": all(len(set(losses)) == 1 for losses in twice),
        "seconds": [row for row in rows if "ready s" in row or "export s" in row],
    }


def files(folder: Path) -> Iterator[Path]:
    """All below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def quarters(steps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Four parts in order."""
    size = -(-len(steps) // 4)
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def served(options: argparse.Namespace) -> dict[str, Any]:
    """Load the run's model, whose rows are a mapped file, and generate 64 tokens twice."""
    started = time.perf_counter()
    model, tokenizer = load_model(options.folder / "run")
    loaded = time.perf_counter() - started
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    found: dict[str, Any] = {"load s": round(loaded, 2), **memory()}
    for name in ("first", "again"):
        before = counters()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
        cost = {key: value - before[key] for key, value in counters().items()}
        found[f"{name}: s per token"] = round(cost["s"] / 64, 4)
        found[f"{name}: disk reads per token"] = round(cost["disk reads"] / 64, 1)
    return found | {f"{key} afterwards": value for key, value in memory().items()}


if __name__ == "__main__":
    main()
