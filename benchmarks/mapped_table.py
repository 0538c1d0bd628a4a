"""Train and serve tables in mapped files: step times beside tables in memory, cache hits, and the bits after SIGKILL.

python benchmarks/mapped_table.py --folder /tmp/mapped [--experts 67108864 --row-dim 64 --steps 200 --cache "4 GB"]

Each part becomes a line of JSON in FOLDER/rows.jsonl; those that are there are not made again, and an interrupted
training is resumed. `--parts` names some of them. The default is small enough for any machine. Files of tables take 4
bytes for each of experts * row_dim, and are deleted with --delete. "zipf in the run's files" changes the rows that
RUN/model has, so that "serve" comes before it.
"""

# ruff: noqa: T201, a line on the terminal is what this is for

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from peerlm.files import free_bytes
from peerlm.layers import ExpertTable
from peerlm.layers.mapped.file import HEAD, PAGE, REGION
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.store import RowStore
from peerlm.layers.mapped.table import MappedTable, mapped_in, mapped_tables
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
PROMPT = "Once upon a time"
WRITTEN = 64
"""Tokens that a request asks for."""


def main() -> None:
    """Measure what is missing, print all rows."""
    parts = {
        "train": trained,
        "serve": served,
        "zipf in memory": lambda options: zipf(options, None),
        "zipf in files": lambda options: zipf(options, ""),
        "zipf in files, small cache": lambda options: zipf(options, options.zipf_cache),
        "zipf in the run's files": zipf_of_run,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default: all")
    parser.add_argument("--experts", type=int, default=1 << 16)
    parser.add_argument("--row-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", default="64 MB")
    parser.add_argument("--compared", type=int, default=8, help="of so many regions of a file one is compared; 1: all")
    parser.add_argument("--zipf-experts", type=int, default=1 << 15)
    parser.add_argument("--zipf-cache", default="8 MB", help="of the table with --zipf-experts")
    parser.add_argument("--zipf-steps", type=int, default=20)
    parser.add_argument("--delete", action="store_true", help="files of tables and of the run, afterwards")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    require_room(options)
    rows = options.folder / "rows.jsonl"
    done = {json.loads(line)["name"] for line in rows.read_text().splitlines()} if rows.is_file() else set()
    for name in options.parts:
        if name not in done:
            print(f"{name} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            row = {"name": name, **parts[name](options), "seconds of this part": round(time.perf_counter() - started)}
            row |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(rows.read_text())
    if options.delete:
        for name in ("rows", "run", "zipf"):
            shutil.rmtree(options.folder / name, ignore_errors=True)


def require_room(options: argparse.Namespace) -> None:
    """Stop before anything is made where the disk has too little room for all of it."""
    files = options.experts * (4 * options.row_dim + 4) + options.zipf_experts * 4 * options.row_dim
    logs = options.steps // 2 * 512 * LOOKED_UP * (4 * options.row_dim + 12)
    there = sum(each.stat().st_blocks * 512 for each in every_file(options.folder))
    free = free_bytes(options.folder)
    needed = files + logs - there
    if needed > free:
        raise SystemExit(
            f"the disk of {options.folder} has {free / 1e9:.3g} GB free, and files of {needed / 1e9:.3g} GB are "
            "still to be made: free some space, or take fewer --experts"
        )


def zipf(options: argparse.Namespace, cache: str | None) -> dict[str, Any]:
    """Steps of a table of its own, used as by Zipf's law.

    cache: None for a table in memory; "" for files without a bound.
    """
    torch.manual_seed(0)
    place = None
    if cache is None:
        table = ExpertTable(options.zipf_experts, options.row_dim, row_format="bfloat16")
    else:
        place = RowPlace(options.folder / "zipf", cache=TablesConfig(cache=cache).cache_bytes)
        with tables_as(mapped_in(place)):
            table = ExpertTable(options.zipf_experts, options.row_dim, row_format="bfloat16")
    optimizer = RowAdamW(table.parameters(), lr=1e-3, betas=(0.0, 0.99), lazy=True, row_wise=True)
    found = {
        "cache": cache,
        **zipf_steps(options, table, optimizer),
        "sum": float(table.read().detach().double().sum()),
    }
    if place is not None:
        place.close()
        shutil.rmtree(place.folder)
    return found


def zipf_of_run(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of the run's table, in the files of the run, from its last checkpoint on."""
    drop_cache(options.folder)
    with join_ranks("cpu") as ranks:
        config = configuration(options)
        windows, _ = open_data(config.data, ranks, progress=False)
        training = build_training(config, ranks, windows)
        last_state(training)
        (table,) = mapped_tables(training.model).values()
        found = {"cache": options.cache, **zipf_steps(options, table, training.optimizer)}
        close_tables(training.model)
    return found


def zipf_steps(options: argparse.Namespace, table: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Steps of 1,024 tokens that look 128 rows up each, the row of rank r with a probability like 1 / r."""
    count, dim = table.num_experts, table.dim
    torch.manual_seed(1)
    seconds, hits, distinct = [], [], []
    for _ in range(options.zipf_steps):
        rank = (count ** torch.rand(1024, LOOKED_UP, dtype=torch.float64)).long().clamp_(max=count - 1)
        ids = rank * 2654435761 % count  # neighbours in rank lie anywhere
        x, weights = torch.randn(1024, dim), torch.rand(1024, LOOKED_UP)
        distinct.append(len(ids.unique()))
        if isinstance(table, MappedTable):
            hits.append(share_in_memory(table, ids))
        started = time.perf_counter()
        table(x, weights, ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    late = len(seconds) // 2
    found: dict[str, Any] = {
        "experts": count,
        "row_dim": dim,
        "distinct rows of a step": statistics.median(distinct),
        "median step s": round(statistics.median(seconds[late:]), 4),
        "step s": [round(each, 3) for each in seconds],
    }
    if isinstance(table, MappedTable):
        found["resident MB"] = round(table.place.resident_bytes() / 1e6)
        found["share of rows in memory when looked up"] = round(statistics.mean(hits[late:]), 4)
        found["share by step"] = [round(each, 3) for each in hits]
    return found


def share_in_memory(table: MappedTable, ids: torch.Tensor) -> float:
    """Of the distinct rows looked up, how many the page cache has."""
    file = store_of(table).files["rows"]
    pages = (ids.unique() * file.row_bytes + HEAD) // PAGE
    return float(file._resident(0, HEAD + file.num_bytes)[pages].float().mean())


def store_of(table: MappedTable) -> RowStore:
    """Where its rows are."""
    assert table._store is not None
    return table._store


def drop_cache(folder: Path) -> None:
    """Have the files of tables on the disk alone."""
    for path in (folder / "rows").rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
            "checkpoint": {"every": max(1, options.steps // 2), "minutes": 0, "keep": 1},
            "log": {"every": max(1, options.steps // 20)},
            "tables": {"folder": str(folder / "rows"), "cache": options.cache},
        },
    )


class Meter(Hook):
    """Writes what each step has cost the process, and what its rows have become."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self.options, self.file = options, path.open("a")
        self.before, self.measuring, self.hits = counters(), 0.0, 0.0

    def before_step(self, training: Training, state: TrainState, progress: float) -> TrainState:
        """Have the next look-up say which of its rows are in memory; in every tenth step, for it takes a while."""
        (table,) = mapped_tables(training.model).values()
        store = store_of(table)
        self.hits, self.measuring, self.before = float("nan"), 0.0, counters()
        if state.step % 10 == 9:

            def use(ids: torch.Tensor, *, training: bool) -> None:
                del store.use  # type: ignore[attr-defined]
                started = time.perf_counter()
                self.hits = share_in_memory(table, ids)
                self.measuring = time.perf_counter() - started
                store.use(ids, training=training)

            store.use = use  # type: ignore[method-assign]
        return state

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """One line of JSON."""
        now = counters()
        (table,) = mapped_tables(training.model).values()
        gradient = table.rows.grad
        assert gradient is not None
        ids = gradient._indices()[0].unique()
        row = {name: round(now[name] - self.before[name], 4) for name in now} | {
            "pid": os.getpid(),
            "step": state.step,
            "loss": training.measures.newest["loss"],
            "rows": len(ids),
            "crc32 of rows and moments": [crc32(file.bytes[ids]) for file in store_of(table).files.values()],
            **memory(),
        }
        row["s"] = round(row["s"] - self.measuring, 4)
        if self.hits == self.hits:
            row["share of rows in memory"] = round(self.hits, 4)
        if state.step == self.options.steps // 2:
            row["digest"] = digest(table, self.options.compared)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        return state


def digest(table: MappedTable, every: int) -> list[int]:
    """Of each file of a table a CRC-32 over one of so many regions."""
    found = []
    for file in store_of(table).files.values():
        flat, checksum = file.bytes.view(-1), 0
        size = min(REGION, max(1, len(flat) // every))
        with file.path.open("rb") as content:  # not through the map, which reads a page at a time
            for begin in range(0, len(flat), size * every):
                content.seek(HEAD + begin)
                checksum = zlib.crc32(content.read(min(size, len(flat) - begin)), checksum)
                os.posix_fadvise(content.fileno(), HEAD + begin, size, os.POSIX_FADV_DONTNEED)  # in large pieces
        found.append(checksum)
    return found


def crc32(content: torch.Tensor) -> int:
    """Of its bytes."""
    return zlib.crc32(content.contiguous().numpy())


def counters(pid: int | str = "self") -> dict[str, float]:
    """Seconds, and of a process reads that waited for the disk, bytes read and written."""
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return {
        "s": time.perf_counter(),
        "disk reads": int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9]),
        "MB read": int(io["read_bytes"]) / 1e6,
        "MB written": int(io["write_bytes"]) / 1e6,
    }


def memory(pid: int | str = "self") -> dict[str, int]:
    """Megabytes of a process: its own, and of mapped files."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = {"RssAnon:": "own MB", "RssFile:": "files MB"}
    return {names[line[0]]: int(line[1]) // 1000 for line in lines if line[0] in names}


def work(options: argparse.Namespace) -> None:
    """From the newest checkpoint, or the start, to the end."""
    config, path = configuration(options), options.folder / "steps.jsonl"
    started = time.perf_counter()
    with join_ranks("cpu") as ranks:
        windows, _ = open_data(config.data, ranks, progress=False)
        prepared = time.perf_counter()
        training = build_training(config, ranks, windows, Meter(options, path), progress=True)
        built = time.perf_counter()
        training.check_space(progress=True)
        open_run(config)
        state = last_state(training)
        row = {"data s": prepared - started, "build s": built - prepared, "restore s": time.perf_counter() - built}
        row = {name: round(seconds, 1) for name, seconds in row.items()} | {"pid": os.getpid(), "from step": state.step}
        if state.step == options.steps // 2:
            row["digest"] = digest(*mapped_tables(training.model).values(), options.compared)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with training.reporting(state, progress=True):
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
    """Train, killed once between two checkpoints; compare the losses and rows of the steps that were made twice."""
    path, kill_at = options.folder / "steps.jsonl", options.steps // 2 + max(2, options.steps // 20)
    command = [sys.executable, *sys.argv, "--worker"]
    killed = any("killed" in row for row in read(path))
    while not any("export s" in row for row in read(path)):
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(0.1)
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
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in steps:
        by_step.setdefault(row["step"], []).append(row)
    twice = [made for made in by_step.values() if len(made) > 1]
    same = ("loss", "rows", "crc32 of rows and moments")
    logs = list((options.folder / "rows").rglob("undo-*.log"))
    digests = [row["digest"] for row in rows if "digest" in row]
    hits = [row["share of rows in memory"] for row in steps if "share of rows in memory" in row]
    late = steps[len(steps) // 2 :]
    return {
        "experts": options.experts,
        "row_dim": options.row_dim,
        "parameters of the table": options.experts * 2 * options.row_dim,
        "GB of files": round(sum(each.stat().st_blocks * 512 for each in every_file(options.folder / "rows")) / 1e9, 2),
        "GB of logs": round(sum(each.stat().st_size for each in logs) / 1e9, 3),
        "cache": options.cache,
        "steps": max(by_step),
        "median step s": statistics.median(row["s"] for row in late),
        "median step s by quarter": [
            statistics.median(row["s"] for row in part) for part in quarters(sorted(steps, key=lambda row: row["step"]))
        ],
        "rows of a step": statistics.median(row["rows"] for row in steps),
        "share of rows in memory when looked up": round(statistics.mean(hits[len(hits) // 2 :]), 4) if hits else None,
        "share by tenth step": hits,
        "reads that waited, over rows": statistics.median(row["disk reads"] / row["rows"] for row in late),
        "MB read a step": statistics.median(row["MB read"] for row in late),
        "MB written a step": statistics.median(row["MB written"] for row in late),
        "most own MB": max(row["own MB"] for row in steps),
        "most MB of files": max(row["files MB"] for row in steps),
        "first loss": by_step[1][0]["loss"],
        "last loss": by_step[max(by_step)][0]["loss"],
        "steps made twice around SIGKILL": len(twice),
        "losses of these equal": all(row["loss"] == made[0]["loss"] for made in twice for row in made),
        "rows and moments of these equal": all(
            row[name] == made[0][name] for made in twice for row in made for name in same
        ),
        "files compared after the restore": f"1/{options.compared}",
        "files after the restore equal to those of the checkpoint": len(digests) > 1
        and all(each == digests[0] for each in digests),
        "seconds": [row for row in rows if "build s" in row or "export s" in row],
    }


def every_file(folder: Path) -> Iterator[Path]:
    """All below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def quarters(steps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Four parts in order."""
    size = -(-len(steps) // 4)
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def served(options: argparse.Namespace) -> dict[str, Any]:
    """Start `peerlm serve` on the run, whose rows are on the disk alone, and have it write the same text twice."""
    drop_cache(options.folder)
    started = time.perf_counter()
    command = [sys.executable, "-m", "peerlm", "serve", str(options.folder / "run"), "--port", "0", "--no-log"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(line.split(" at ")[1].split()[0] for line in server.stdout if line.startswith("Serving "))
        found: dict[str, Any] = {"until it answers s": round(time.perf_counter() - started, 2), **memory(server.pid)}
        texts = []
        for name, prompt in (("first", PROMPT), ("again", PROMPT), ("another prompt", "The king of the north")):
            before = counters(server.pid)
            texts.append(completion(address, prompt))
            cost = {key: value - before[key] for key, value in counters(server.pid).items()}
            found[f"{name}: s per token"] = round(cost["s"] / WRITTEN, 4)
            found[f"{name}: disk reads per token"] = round(cost["disk reads"] / WRITTEN, 1)
            found[f"{name}: MB read"] = round(cost["MB read"], 1)
        found["text again equal"] = texts[0] == texts[1]
        return found | {f"{key} afterwards": value for key, value in memory(server.pid).items()}
    finally:
        server.terminate()
        server.wait()


def completion(address: str, prompt: str) -> str:
    """What the server writes."""
    body = {"model": "run", "prompt": prompt, "max_tokens": WRITTEN, "temperature": 0, "ignore_eos": True}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        found = json.load(answer)
    assert found["usage"]["completion_tokens"] == WRITTEN, found
    return str(found["choices"][0]["text"])


if __name__ == "__main__":
    main()
