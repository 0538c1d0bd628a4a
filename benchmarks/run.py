"""Every benchmark of the layer and its kernels, each in a process of its own: rows as JSON, then a table.

python benchmarks/run.py [--quick] [--output benchmarks/results/NAME.jsonl]
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SMALL, MIDDLE = 128**2, 512**2


def commands(*, quick: bool) -> list[list[str]]:
    """What is run, in order; with `quick` the main figures alone."""
    layer, kernels = str(HERE / "peer_layer.py"), str(HERE / "kernels.py")
    todo = [
        [kernels],
        [layer, "PEER-pytorch", "--tuned"],
        [layer, "PEER-pytorch", "--rounds", "3"],
        [layer, "SparseAdam", "--tuned", "--parts", "step"],
        [layer, "lazy", "--parts", "step"],
        [layer, "fused", "--parts", "step"],
        [layer, "none", "--parts", "step", "--num-experts", str(SMALL)],
        [layer, "none", "--parts", "step"],
        [layer, "none", "--parts", "step", "--keep-freed-memory"],
        [layer, "PEER-pytorch", "--tuned", "--parts", "step", "--keep-freed-memory"],
        [layer, "reference", "--parts", "forward", "decode"],
        [layer, "none", "--parts", "forward", "decode", "--row-format", "bfloat16"],
        [layer, "none", "--parts", "forward", "decode", "--row-format", "int8"],
    ]
    for baseline in ("none", "PEER-pytorch", "SparseAdam"):
        todo.append([layer, baseline, "--memory"])
    todo.append([layer, "none", "--memory", "--mode", "fused"])
    if quick:
        return todo
    forward = ["--parts", "forward"]
    for baseline in ("dense, equal active", "dense, 4 d"):
        todo.append([layer, baseline, "--parts", "forward", "backward", "step", "decode"])
    todo += [[layer, baseline, *forward] for baseline in ("bag", "compiled reference")]
    for num_experts in (SMALL, MIDDLE):
        todo.append([layer, "PEER-pytorch", "--tuned", "--num-experts", str(num_experts)])
    for dim in (512, 1024):
        todo.append([layer, "reference", *forward, "decode", "--dim", str(dim), "--num-experts", str(MIDDLE)])
        todo.append([layer, "PEER-pytorch", "--tuned", "--dim", str(dim), "--num-experts", str(MIDDLE)])
    todo.append([layer, "reference", *forward, "--tokens", "64"])
    todo.append([layer, "PEER-pytorch", "--tuned", "--tokens", "64"])
    return [*todo, [kernels, "--zipf"], [kernels, "--num-experts", str(SMALL)]]


def main() -> None:
    """Run all, continue where one fails, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE / "results" / f"{datetime.date.today().isoformat()}.jsonl"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.unlink(missing_ok=True)
    failed = []
    for command in commands(quick=options.quick):
        print("python", *command, flush=True)
        if subprocess.run([sys.executable, *command, "--json", str(options.output)]).returncode:
            failed.append(" ".join(command))
    print("\n| part | N | T | d | contender | median | lowest .. highest |\n|---|---|---|---|---|---|---|")
    for row in map(json.loads, options.output.read_text().splitlines()):
        sizes = f"{row['num_experts']} | {row['tokens']} | {row['dim']}"
        spread = f"{row['lowest']:.2f} .. {row['highest']:.2f}"
        print(f"| {row['part']} | {sizes} | {row['contender']} | {row['median']:.2f} | {spread} |")
    if failed:
        sys.exit("these failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
