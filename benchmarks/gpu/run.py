"""Measures peerlm on one GPU: the limits of the card, then our layer beside others, rows as JSON, then a table.

Needs this checkout, Python, torch >= 2.11, triton >= 3.6 and numpy; nothing is installed or downloaded. Each section
runs in a process of its own with a deadline, and the whole ends within --minutes. A row is on disk as soon as it is
measured; what fails or does not fit into memory is a row that says so. Without a GPU, or with --interpret, all of it
runs at tiny sizes in Triton's interpreter: that shows that the script works, its figures mean nothing.

    python benchmarks/gpu/run.py --prepare                    PEER-pytorch into build/gpu, to travel with the checkout
    python benchmarks/gpu/run.py --output rows.jsonl          the whole run
    python benchmarks/gpu/run.py --only kernels layer         these sections alone
"""

# ruff: noqa: T201, a table on the terminal is what this is for

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import goals
from machine import ROOT, commit, description
from processes import run_sections
from rows import read_rows
from sections import SECTIONS
from sizes import SIZES
from table import lines
from wheels import prepare

_MINUTES, _INTERPRETED = 8, 15
"""Of a run; in the interpreter it takes fewer on a machine that does nothing else."""
_TIMES = 3
"""As long as on a GPU a section may take in the interpreter, where others leave it the time."""
_TO_END = 8
"""Seconds kept for the table."""


def main() -> None:
    """Parse, run the sections, print the table."""
    names = [section.name for section in SECTIONS]
    sections = "\n".join(f"  {each.name:15} {each.seconds:4} s  {each.caption}" for each in SECTIONS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"sections:\n{sections}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="file that rows are appended to (default: gpu.jsonl in $OUT, or build/gpu.jsonl)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"the whole run ends within these (default: {_MINUTES}; {_INTERPRETED} without a GPU)",
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help="these sections, in this order")
    parser.add_argument("--sizes", choices=SIZES, help="default: full on a GPU, tiny without one")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter, on a CPU, at tiny sizes")
    parser.add_argument("--prepare", action="store_true", help="fetch what the run needs into build/gpu, and end")
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the table of a file of rows, and end")
    options = parser.parse_args()
    started = time.monotonic()
    if options.table:
        print("\n".join(summary(read_rows(options.table))))
        return
    if options.prepare:
        folder = prepare()
        print(f"{folder} holds PEER-pytorch: take it along with the checkout")
        return
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))}
    if options.interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    try:
        machine = description(environment)
    except RuntimeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    interpreted = not machine["card"]
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    sizes = options.sizes or ("tiny" if interpreted else "full")
    output = options.output or _default_output()
    output.parent.mkdir(parents=True, exist_ok=True)
    before = len(read_rows(output)) if output.is_file() else 0
    every_row = {"commit": commit(), "sizes": sizes, "interpreted": interpreted, **machine}
    print(f"{machine['card'] or 'no GPU: tiny sizes in the interpreter, figures mean nothing'}; rows in {output}")
    chosen = [next(each for each in SECTIONS if each.name == name) for name in options.only or names]
    if interpreted:
        chosen = [replace(each, seconds=_TIMES * each.seconds) for each in chosen]
    run_sections(
        chosen,
        output,
        sizes=sizes,
        every_row=every_row,
        seconds=60 * (options.minutes or (_INTERPRETED if interpreted else _MINUTES))
        - (time.monotonic() - started)
        - _TO_END,
        environment=environment,
    )
    print("\n" + "\n".join(summary(read_rows(output)[before:])))
    print(f"{time.monotonic() - started:.0f} s; rows in {output}")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The table; of a GPU's figures also the goals."""
    measured = any(row.get("card") for row in rows)
    return [*lines(rows), "", *goals.lines(rows)] if measured else lines(rows)


def _default_output() -> Path:
    return Path(os.environ["OUT"]) / "gpu.jsonl" if os.environ.get("OUT") else ROOT / "build/gpu.jsonl"


if __name__ == "__main__":
    sys.exit(main())
