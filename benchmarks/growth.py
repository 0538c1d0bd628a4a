"""Growth of one layer's table: time against copying the rows that are added, and memory at its peak.

    python benchmarks/growth.py

Both in turn in one process; medians. Memory is that of the process over what it was before. With an optimizer
its two moments grow as well, three times as much as is copied.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from measure import report

from peerlm.growth import grow
from peerlm.layers import PEER
from peerlm.layers.row_memory import empty_rows
from peerlm.optim import RowAdamW, parameter_groups


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def grown(n: int, new_n: int, dim: int, trained: bool) -> dict[str, float]:
    """One growth: its seconds, those of copying as many rows as it adds, and its peak memory over the grown state."""
    gc.collect()  # a table and the optimizer that watches it refer to each other
    before = memory_bytes("VmRSS")
    layer = PEER(dim, num_experts=n * n, pairing="shells")
    optimizer = None
    if trained:
        optimizer = RowAdamW(parameter_groups(layer), lr=1e-3)
        layer(torch.randn(64, dim)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.perf_counter()
    grow(layer, new_n * new_n, optimizer=optimizer)
    seconds = time.perf_counter() - started
    peak, state = memory_bytes("VmHWM") - before, memory_bytes("VmRSS") - before
    source = torch.randn(new_n * new_n - n * n, 2, dim)
    started = time.perf_counter()
    copied = empty_rows(*source.shape)
    copied.copy_(source)
    copying = time.perf_counter() - started
    return {"seconds": seconds, "copying_seconds": copying, "ratio": seconds / copying, "peak": peak / state}


def main() -> None:
    """Measure without and with an optimizer's state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=(512, 1024), metavar="N", help="sub-keys before and after"
    )
    parser.add_argument("--json", type=Path, help="append rows to this file")
    options = parser.parse_args()
    for trained in (False, True):
        runs = [grown(*options.sizes, options.dim, trained) for _ in range(options.repetitions)]
        figures = {name: [run[name] for run in runs] for name in runs[0]}
        sizes = {"sub_keys": options.sizes, "dim": options.dim, "with_optimizer": trained}
        report("growth", figures, sizes, options.json)


if __name__ == "__main__":
    main()
