"""What `peerlm plan --gpus` shows: meshes, the parts of the best one, assumptions, what would fit."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from peerlm.cli.show import show
from peerlm.errors import UserError, listed
from peerlm.terminal import VALUE, print_markdown, print_table

OF_BUDGET = ("flops", "memory", "row_bytes", "method", "law", "vocab_size", "context")
MOST_MESHES = 8
"""That are shown; JSON has all."""


def check_kind(given: set[str]) -> None:
    """Raise UserError unless the options that were given, by their names, ask for one kind of plan and suffice."""
    if "flops" not in given and "gpus" not in given:
        raise UserError("there is nothing to plan for: give --flops, or --gpus with --num-experts and --dim")
    wrong = sorted(given & set(OF_BUDGET)) if "gpus" in given else sorted(given - set(OF_BUDGET))
    if wrong:
        other = "--gpus" if "gpus" in given else "--flops"
        raise UserError(f"{listed(map(_option, wrong))} cannot be combined with {other}: leave one of them out")
    missing = [_option(name) for name in ("num_experts", "dim") if "gpus" in given and name not in given]
    if missing:
        raise UserError(f"--gpus needs {' and '.join(missing)} too")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def show_mesh_plan(
    gpus: int, gpu: str, per_node: int, num_experts: float, settings: Mapping[str, Any], json_file: Path | None
) -> None:
    """Plan a mesh of the GPUs for tables of these settings of `Tables`, and print it.

    Raises:
        UserError: a setting out of range.
    """
    dense = settings["dense_parameters"]
    if not (math.isfinite(dense) and dense >= 0):
        raise UserError(f"--dense-parameters {dense:g}: must be at least 0")

    from peerlm.parallel.plans import gpu_named, plan_meshes, tables_of, what_would_fit

    tables = tables_of(num_experts, **{**settings, "dense_parameters": round(dense)})
    kind = gpu_named(gpu)
    plans = plan_meshes(tables, gpus, kind, per_node=per_node)
    if not plans:
        raise UserError(f"no cut of {tables.dim} columns over {gpus} GPUs can be trained: take another --dim or --gpus")
    best = plans[0]
    others = [] if best.fits else what_would_fit(tables, gpus, kind, per_node=per_node)
    lines = _assumptions(tables, gpu, kind, per_node)

    def tables_shown() -> None:
        if best.fits:
            shape = best.shape
            typer.echo(f"Best mesh: replica = {shape.replica}, cols = {shape.cols}, rows = {shape.rows}")
        else:
            typer.echo(f"No mesh of {gpus} GPUs fits: {best.obstacle}.")
        shown = {_mesh(each): _quantities(each) for each in plans[:MOST_MESHES]}
        left = f", first {MOST_MESHES} of {len(plans)}" if len(plans) > MOST_MESHES else ""
        print_table(f"replica x cols x rows{left}; received per token", shown, rows=True)
        parts = {f"{name}, GB": f"{size / 1e9:.3g}" for name, size in best.memory.items()}
        parts |= {f"{name}, ms per step": f"{1e3 * each:.3g}" for name, each in best.seconds.items()}
        print_table(f"{_mesh(best)}, of one GPU", {VALUE: parts})
        if not best.fits:
            fitting = {words: {"mesh": _mesh(each), **_quantities(each)} for words, each in others}
            if fitting:
                print_table("would fit", fitting, rows=True)
            else:
                typer.echo("Nothing that was tried would fit.")
        print_markdown("\n\n".join(lines))

    figures = {
        "num_experts": tables.num_rows,
        "gpus": gpus,
        "gpu": gpu,
        "meshes": [each.row() for each in plans],
        "would_fit": [{"change": words, **each.row()} for words, each in others],
        "assumptions": lines,
    }
    show(figures, json_file, tables_shown)


def _mesh(plan: Any) -> str:
    shape = plan.shape
    return f"{shape.replica} x {shape.cols} x {shape.rows}"


def _quantities(plan: Any) -> dict[str, str]:
    return {
        "GB": f"{sum(plan.memory.values()) / 1e9:.4g}",
        "network, KB": f"{plan.received['network'] / 1e3:.4g}",
        "NVLink, KB": f"{plan.received['nvlink'] / 1e3:.4g}",
        "ms": f"{1e3 * max(plan.seconds.values()):.3g} to {1e3 * sum(plan.seconds.values()):.3g}",
        "fits": plan.obstacle or "yes",
    }


def _assumptions(tables: Any, name: str, gpu: Any, per_node: int) -> list[str]:
    from peerlm.parallel.cost import UTILISATION
    from peerlm.parallel.plans import USABLE

    kept = (
        "two float32 moments of each number"
        if tables.row_format == "float32"
        else "optim.table_beta1 = 0 and optim.table_moment_columns = 128"
    )
    rest = f"{tables.dense_parameters:,} parameters" if tables.dense_parameters else "nothing else"
    return [
        f"Tables: {tables.layers} of {tables.num_rows:,} rows of {tables.vectors} x {tables.dim} {tables.row_format} "
        f"numbers, {kept}. {tables.entries} rows for each of {tables.tokens:,} tokens per GPU and step.",
        f"A GPU ({name}, by its data sheet): {gpu.memory / 1e9:.0f} GB, of which {USABLE:.0%} are filled. It reads "
        f"{gpu.memory_bandwidth / 1e12:.3g} TB/s. Links: NVLink {gpu.nvlink / 1e9:.0f} GB/s within {per_node} GPUs, "
        f"network {gpu.network / 1e9:.0f} GB/s. Matrix products: {UTILISATION:.0%} of {gpu.flops / 1e12:.0f} TFLOPs.",
        "Time: the first number is the slowest part alone, the second one part after another. No time was measured. "
        "Links and memory run at full speed, and all ranks look up equally many rows. A popular band of rows makes its "
        "ranks slower.",
        f"The rest of the model: query maps and {rest}, in float32 and cut by FSDP2. It takes 6 FLOPs for each number "
        "and token. Heads share sub-keys. Buffers are an estimate. Activations outside of the tables' exchange and "
        "scores of retrieval are left out.",
        "replica: copies of each table, which average the gradients of their rows. All rows that tokens look up count "
        "as different ones. With --fused there is one copy.",
    ]
