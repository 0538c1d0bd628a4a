"""Commands that make studies of many runs, and read what came of them."""

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.cli.root import Json, Output, Recipe, Run, Settings, app, overrides
from peerlm.cli.show import STDOUT, show
from peerlm.errors import UserError, listed
from peerlm.terminal import print_markdown, print_table

ShardOf = Annotated[
    str | None, typer.Option("--shard", metavar="K/N", help="Make only share K of N of the rows, as in 2/8.")
]
SlurmOf = Annotated[
    str | None,
    typer.Option(
        "--slurm", metavar="KEY=VALUE,...", help="Submit shares as jobs: partition=gpu,time=480,shards=8, of sbatch."
    ),
]


@app.command(
    examples=[
        "peerlm compare recipes/demo.toml",
        "peerlm compare recipes/demo.toml --set budget.flops=1e12 --output runs/quick",
        "torchrun --nproc-per-node 2 -m peerlm compare recipes/demo.toml --set parallel.rows=2",
    ]
)
def compare(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    shard: ShardOf = None,
    slurm: SlurmOf = None,
    json_file: Json = None,
) -> None:
    """Train PEER and its baselines on the same data for the same FLOPs: table, plots, a sample of text.

    Under torchrun its processes train each run together; memory in the table is that of the first one.
    """
    from peerlm_studies.comparison.compare import compare
    from peerlm_studies.processes import over_ranks
    from peerlm_studies.shards import Shard

    if slurm is not None:
        from peerlm_studies.comparison.make_rows import prepare_texts
        from peerlm_studies.comparison.plan import load_plan

        plan = load_plan(recipe, overrides(settings, output))
        words = _words("compare", recipe, settings, output)
        _submit(words, slurm, shard, plan.output, json_file, partial(prepare_texts, plan.runs))
        return
    shown = json_file != STDOUT
    of_all = Shard.read(shard)
    rows = over_ranks(
        lambda ranks: compare(recipe, overrides(settings, output), progress=shown, shard=of_all, ranks=ranks),
        shown=shown,
    )
    if rows is not None:
        show(rows, json_file, tables=_nothing)  # they were shown when they were made


@app.command(
    examples=[
        "peerlm isoflop recipes/isoflop.toml",
        "peerlm isoflop recipes/isoflop.toml --method PEER --budget 2e12 --seed 2",
        "peerlm isoflop recipes/isoflop_paper_6e18.toml --dry-run --gpu-tflops 400",
    ]
)
def isoflop(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    method: Annotated[list[str], typer.Option(help="Only this method; repeatable.")] = [],  # noqa: B006
    budget: Annotated[list[str], typer.Option(help="Only this budget, by its name; repeatable.")] = [],  # noqa: B006
    size: Annotated[list[str], typer.Option(help="Only this size, by its name; repeatable.")] = [],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="In place of the recipe's seeds; repeatable.")] = [],  # noqa: B006
    dry: Annotated[bool, typer.Option("--dry-run", help="Train nothing: print what each run would take.")] = False,
    gpu_tflops: Annotated[float, typer.Option(help="1e12 FLOPs a second of a GPU, for --dry-run.")] = 400.0,
    utilisation: Annotated[float, typer.Option(help="Share of them that training uses, for --dry-run.")] = 0.4,
    shard: ShardOf = None,
    slurm: SlurmOf = None,
    json_file: Json = None,
) -> None:
    """Train every method at several sizes for the same FLOPs: the curves, and each one's best size.

    Under torchrun its processes train each run together.
    """
    from peerlm_studies.isoflop.study import isoflop
    from peerlm_studies.processes import over_ranks
    from peerlm_studies.shards import Shard

    of_all = Shard.read(shard)
    if dry and of_all is not None:
        raise UserError("--shard cannot be combined with --dry-run, which makes no rows: leave one of them out")
    changes = overrides(settings, output)
    part: dict[str, Any] = {"methods": method, "budgets": budget, "sizes": size}
    if slurm is not None:
        from peerlm_studies.comparison.make_rows import prepare_texts
        from peerlm_studies.isoflop.plan import load_isoflop

        if dry:
            raise UserError("--slurm cannot be combined with --dry-run, which trains nothing: leave one of them out")
        study = load_isoflop(recipe, changes)
        runs = [run.planned for run in study.runs(seed or None, **part)]
        words = _words("isoflop", recipe, settings, output, method=method, budget=budget, size=size, seed=seed)
        _submit(words, slurm, shard, study.output, json_file, partial(prepare_texts, runs))
        return
    if dry:
        from peerlm_studies.isoflop.dry_run import dry_run, dry_run_markdown
        from peerlm_studies.isoflop.plan import load_isoflop

        rows = dry_run(load_isoflop(recipe, changes), gpu_tflops=gpu_tflops, utilisation=utilisation, **part)
        show(rows, json_file, partial(print_markdown, dry_run_markdown(rows)))
    else:
        shown = json_file != STDOUT
        options = {**part, "seeds": seed or None, "progress": shown, "shard": of_all}
        made = over_ranks(lambda ranks: isoflop(recipe, changes, **options, ranks=ranks), shown=shown)
        if made is not None:
            show(made, json_file, tables=_nothing)


@app.command(examples=["peerlm frontier runs/frontier/rows.jsonl --output runs/frontier"])
def frontier(
    rows: Annotated[list[Path], typer.Argument(help="Files of rows that compare or isoflop wrote.")],
    output: Annotated[Path, typer.Option(help="Folder to write: frontier.md, frontier.json and two plots.")],
    method: Annotated[list[str], typer.Option(help="Only this method; repeatable.")] = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Draw what loss costs: over bytes read per token, seconds, memory, and bytes read in decoding."""
    from peerlm_studies.frontier.study import frontier
    from peerlm_studies.frontier.tables import frontier_markdown, frontier_rows

    points = frontier(rows, output, methods=method)
    show(frontier_rows(points), json_file, partial(print_markdown, frontier_markdown(points)))


@app.command(examples=["peerlm seconds recipes/seconds.toml", "peerlm seconds recipes/seconds.toml --speeds"])
def seconds(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    speeds: Annotated[
        bool, typer.Option("--speeds", help="Measure speeds alone: do this on a quiet machine, then train any time.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Train methods for equal seconds: as many steps as fit, at speeds that are measured first."""
    from rich.console import Console

    from peerlm_studies.equal_seconds.plan import load_seconds
    from peerlm_studies.equal_seconds.study import equal_seconds, measure_speeds

    shown = json_file != STDOUT
    changes = overrides(settings, output)
    if speeds:
        found = measure_speeds(load_seconds(recipe, changes), Console(quiet=not shown), progress=shown)
        columns = {
            method: {key: row[key] for key in ("seconds_per_step", "spread", "other_cores", "threads")}
            for method, row in found.items()
        }
        show(list(found.values()), json_file, partial(print_table, "seconds per step", columns, rows=True))
        return
    show(equal_seconds(recipe, changes, progress=shown), json_file, tables=_nothing)


@app.command(examples=["peerlm report results/report.toml --output docs"])
def report(
    definition: Annotated[Path, typer.Argument(help="TOML file that names sections, their rows and their recipes.")],
    output: Annotated[Path, typer.Option(help="Folder to write: results.md with its plots, results.html.")] = Path(
        "docs"
    ),
) -> None:
    """Build the report of results from the rows of all studies, as Markdown and as one HTML file."""
    from peerlm_studies.report.report import report

    for path in report(definition, output):
        typer.echo(path)


@app.command(examples=["peerlm scaling results/isoflop.jsonl --output runs/law.json"])
def scaling(
    rows: Annotated[list[Path], typer.Argument(help="Files of rows that compare or isoflop wrote.")],
    output: Annotated[Path, typer.Option(help="JSON file to write, for `peerlm plan --law`.")],
    method: Annotated[list[str], typer.Option(help="Fit only this method; repeatable.")] = [],  # noqa: B006
    hold_out: Annotated[
        float | None,
        typer.Option(metavar="FLOPS", help="Predict runs from here on by the others; default: the largest."),
    ] = None,
    up_to: Annotated[
        float | None, typer.Option(metavar="FLOPS", help="Leave out runs of more FLOPs; default: none.")
    ] = None,
    draws: Annotated[int, typer.Option(min=20, help="Draws of the bootstrap.")] = 100,
    plot: Annotated[Path | None, typer.Option(help="Image to write: measured over expected loss.")] = None,
    json_file: Json = None,
) -> None:
    """Fit a scaling law to each method's runs: constants with intervals, and how it predicts held-out runs."""
    from peerlm_studies.figures import save_plot
    from peerlm_studies.scaling.laws import law_markdown, plot_law, scaling

    law = scaling(rows, output, methods=method, hold_out=hold_out, up_to=up_to, times=draws)
    if plot is not None:
        save_plot(plot_law(law), plot)
    show(law, json_file, partial(print_markdown, law_markdown(law)))


@app.command(
    examples=[
        "peerlm plan --flops 1e13 --memory 8GiB",
        "peerlm plan --flops 1e13 --method PEER --row-bytes 64KiB",
        "peerlm plan --gpus 256 --gpu h200 --num-experts 1e9 --dim 4096",
    ]
)
def plan(
    ctx: typer.Context,
    flops: Annotated[float | None, typer.Option(help="Training FLOPs to spend.")] = None,
    memory: Annotated[str, typer.Option(help="Memory to train in, as in 80GiB.")] = "inf",
    row_bytes: Annotated[
        str, typer.Option(help="Bytes of tables that a token may read in a forward pass, as in 32KiB.")
    ] = "inf",
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    law: Annotated[
        Path | None, typer.Option(help="What `peerlm scaling` wrote; default: the law of docs/results.md.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Default: that of the law's runs.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Default: that of the law's runs.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Plan a mesh of so many GPUs, in place of a budget.")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, for --gpus: a100, h100, h200 or b200.")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink joins, for --gpus.")] = 8,
    num_experts: Annotated[
        float | None, typer.Option(help="Experts in a layer, for --gpus; the next square number counts.")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model, for --gpus.")] = None,
    vectors: Annotated[int, typer.Option(help="Of an expert, for --gpus: 2, or 3 of gated ones.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads of an index, for --gpus.")] = 8,
    experts_per_head: Annotated[int, typer.Option(help="Experts that a head finds, for --gpus.")] = 16,
    key_dim: Annotated[int, typer.Option(help="Size of a head's query, for --gpus.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers with a table, for --gpus.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of a GPU in a step, for --gpus.")] = 4096,
    row_format: Annotated[
        str, typer.Option(help="float32 with two moments, or bfloat16 with one of 128 columns, for --gpus.")
    ] = "float32",
    fused: Annotated[bool, typer.Option("--fused", help="Rows are updated in the backward pass, for --gpus.")] = False,
    dense_parameters: Annotated[float, typer.Option(help="Of the rest of the model, for --gpus.")] = 0,
    json_file: Json = None,
) -> None:
    """Say what to train for a budget: backbone, experts and tokens of least expected loss, and how sure that is.

    Far from the budgets that the law was fitted to it gives ranges in place of numbers.

    With --gpus it says how to cut tables over a mesh: memory, bytes received and seconds of a step, what fits.
    """
    from peerlm.cli.mesh_plan import check_kind, show_mesh_plan

    given = {
        name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") not in ("DEFAULT", "UNKNOWN")
    }
    check_kind(given - {"json_file"})
    if gpus is not None:
        assert num_experts is not None
        assert dim is not None
        settings = {
            "dim": dim,
            "vectors": vectors,
            "heads": heads,
            "per_head": experts_per_head,
            "key_dim": key_dim,
            "layers": layers,
            "tokens": tokens,
            "row_format": row_format,
            "fused": fused,
            "dense_parameters": dense_parameters,
        }
        show_mesh_plan(gpus, gpu, gpus_per_node, num_experts, settings, json_file)
        return
    assert flops is not None
    from peerlm_studies.scaling.spend import check_spend, read_bytes

    budget = {"flops": flops, "memory": read_bytes(memory), "row_bytes": read_bytes(row_bytes, "--row-bytes")}
    check_spend(**budget)  # before what takes seconds to import

    from peerlm.evaluate.progress import progress_bar
    from peerlm_studies.scaling.law_file import DEFAULT_LAW, read_law
    from peerlm_studies.scaling.planner import plan_model, plan_quantities, plan_row, preface

    fitted = read_law(law or DEFAULT_LAW)
    words = preface(fitted, flops, method)
    with progress_bar(shown=json_file != STDOUT) as bar:
        task = bar.add_task("models tried", total=None)
        found = plan_model(
            fitted,
            **budget,
            method=method,
            vocab_size=vocab_size,
            context=context,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )

    def tables() -> None:
        if words:
            print_markdown(words)
        print_table(f"{flops:g} FLOPs", {each.method: plan_quantities(each) for each in found})

    rows = [plan_row(each) for each in found]
    show(rows, json_file, tables)


@app.command(
    examples=[
        "peerlm neurons runs/dense --text book.txt --output runs/neurons",
        "peerlm neurons runs/dense --data data/demo --output runs/neurons",
        "peerlm neurons runs/dense --data data/demo --output runs/b --finetune 0.2",
        "peerlm neurons my-llama --text book.txt --output out --retrieval reads",
    ]
)
def neurons(
    run: Run,
    output: Annotated[Path, typer.Option(help="Folder to write; rows that are there are not measured again.")],
    text: Annotated[list[Path], typer.Option(help="Text to learn from; its last fifth is held out. Repeatable.")] = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="Prepared folder to learn from, in place of text.")] = None,
    heads: Annotated[int, typer.Option(help="Heads of each index.")] = 8,
    key_dim: Annotated[int, typer.Option(help="Size of a head's query.")] = 16,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows to measure on.")] = 128,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; default: as trained.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of neurons to measure, above 0, at most 1; repeatable.")
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(
            help="learned, reads (of gated neurons), linear, oracle or random; repeatable; default: all but linear."
        ),
    ] = None,
    sketch: Annotated[
        int | None, typer.Option(min=0, help="Rank of the estimate of gates, for reads; default: 16.")
    ] = None,
    fit_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to learn from; each takes width x 4 bytes of memory a layer.")
    ] = 65536,
    fit_steps: Annotated[int, typer.Option(min=0, help="Batches from which each index is learned.")] = 300,
    finetune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Finetune with this share of the neurons, not the report.")
    ] = None,
    flops: Annotated[
        list[float] | None, typer.Option(help="Budget of finetuning; repeatable; default: 0 and 1e12.")
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Peak rate of finetuning; repeatable; default: 1e-3.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Retrieve a dense model's neurons by a learned index: how few of them suffice, and how that finetunes."""
    from peerlm_studies.neurons.finetune import finetune_neurons
    from peerlm_studies.neurons.measure import measure_neurons

    options: dict[str, Any] = {
        "text": text,
        "data": data,
        "settings": {"heads": heads, "key_dim": key_dim},
        "windows": windows,
        "context": context,
        "fit_tokens": fit_tokens,
        "fit_steps": fit_steps,
        "progress": json_file != STDOUT,
    }
    if finetune is not None:
        if share or retrieval or sketch is not None:
            raise UserError("--share, --retrieval and --sketch choose what is measured; leave them out with --finetune")
        options |= {"flops": flops or (0.0, 1e12), "learning_rates": learning_rate or (1e-3,)}
        rows = finetune_neurons(run, output, share=finetune, **options)
        columns = {f"{row['start']}, {row['flops']:.3g} FLOPs, rate {row['learning_rate']}": row for row in rows}
        shown = ["perplexity", "train_tokens", "total_parameters", "seconds"]
        result: object = rows
    else:
        if flops or learning_rate:
            raise UserError("--flops and --learning-rate are of finetuning; name --finetune SHARE, or leave them out")
        given = {"retrievals": retrieval, "sketch": sketch, "shares": share}
        options |= {name: value for name, value in given.items() if value not in (None, [])}
        report = measure_neurons(run, output, **options)
        columns = {f"{row['retrieval']} {row['share']:.0%}": row for row in report["rows"]}
        shown = ["perplexity", "dense_perplexity", "flops_per_token"]
        result = report

    def tables() -> None:
        chosen = {name: {key: row[key] for key in shown} for name, row in columns.items()}
        print_table(str(run), chosen, rows=True)
        if finetune is None:
            print_table("smallest share within an increase of perplexity", report["smallest_shares"])

    show(result, json_file, tables)


@app.command(
    examples=[
        "peerlm lifelong recipes/lifelong.toml",
        "peerlm lifelong recipes/lifelong.toml --set lifelong.seeds=[0]",
    ]
)
def lifelong(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    shard: ShardOf = None,
    slurm: SlurmOf = None,
    json_file: Json = None,
) -> None:
    """Let models of one domain learn others by each method: what is learned against what is forgotten."""
    from peerlm_studies.lifelong.study import lifelong
    from peerlm_studies.shards import Shard

    if slurm is not None:
        from peerlm_studies.lifelong.plan import load_plan

        study = load_plan(recipe, overrides(settings, output)).output
        _submit(_words("lifelong", recipe, settings, output), slurm, shard, study, json_file)
        return
    result = lifelong(recipe, overrides(settings, output), progress=json_file != STDOUT, shard=Shard.read(shard))
    show(result, json_file, tables=_nothing)


def _words(
    name: str, recipe: Path, settings: Sequence[str], output: Path | None, **others: Sequence[object]
) -> list[str]:
    """A command of a study as it is typed, without its share of the rows."""
    given = {"set": settings, "output": [output] if output else [], **others}
    return [name, str(recipe), *(f"--{option}={value}" for option, values in given.items() for value in values)]


def _submit(
    words: list[str],
    slurm: str,
    shard: str | None,
    output: Path,
    json_file: Path | None,
    prepare: Callable[..., None] | None = None,
) -> None:
    """Submit a study's shares as jobs, once its text is prepared, and say what to type when they have ended."""
    from peerlm_studies.slurm import SlurmConfig, submit

    if shard is not None:
        raise UserError("--shard cannot be combined with --slurm, which submits every share: leave one of them out")
    config = SlurmConfig.read(slurm)
    if prepare is not None:
        prepare(shown=json_file != STDOUT)
    jobs = submit(words, config, output / "slurm")
    merge = shlex.join(["peerlm", *words])
    result = {"jobs": [job.job_id for job in jobs], "logs": str(output / "slurm"), "merge": merge}

    def tables() -> None:
        typer.echo(f"{len(jobs)} jobs are submitted: {listed(result['jobs'])}. Their logs are in {result['logs']}.")
        typer.echo(f"When they have ended, this merges their rows into tables and plots: {merge}")

    show(result, json_file, tables)


def _nothing() -> None:
    """Tables of a study that have been shown with its progress."""
