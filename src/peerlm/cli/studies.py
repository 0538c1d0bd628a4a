"""Commands that make studies of many runs, and read what came of them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from peerlm.cli.root import Json, Output, Recipe, Run, Settings, app, overrides
from peerlm.cli.show import print_json, print_table, transposed


@app.command(
    epilog="Examples: peerlm compare recipes/demo.toml\n\n"
    "peerlm compare recipes/demo.toml --set budget.flops=1e12 --output runs/quick"
)
def compare(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Train PEER and its rivals on the same data for the same FLOPs: table, plots, a sample of text."""
    from peerlm_studies.comparison.compare import compare

    rows = compare(recipe, overrides(settings, output), progress=not as_json)
    if as_json:
        print_json(rows)


@app.command(
    epilog="Examples: peerlm isoflop recipes/isoflop.toml\n\n"
    "peerlm isoflop recipes/isoflop.toml --method PEER --budget 2e12 --size d64 --seed 2 --output runs/again\n\n"
    "peerlm isoflop recipes/isoflop_paper_6e18.toml --dry-run --gpu-tflops 400 --utilisation 0.4"
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
    as_json: Json = False,
) -> None:
    """Train every method at several sizes for the same FLOPs: the curves, and each one's best size."""
    from peerlm_studies.isoflop.study import isoflop

    changes = overrides(settings, output)
    part: dict[str, Any] = {"methods": method, "budgets": budget, "sizes": size}
    if dry:
        from rich.markdown import Markdown

        from peerlm_studies.isoflop.dry_run import dry_run, dry_run_markdown
        from peerlm_studies.isoflop.plan import load_isoflop

        rows = dry_run(load_isoflop(recipe, changes), gpu_tflops=gpu_tflops, utilisation=utilisation, **part)
        if not as_json:
            Console().print(Markdown(dry_run_markdown(rows)))
    else:
        rows = isoflop(recipe, changes, **part, seeds=seed or None, progress=not as_json)
    if as_json:
        print_json(rows)


@app.command(epilog="Example: peerlm report results/report.toml --output docs")
def report(
    definition: Annotated[Path, typer.Argument(help="TOML file that names sections, their rows and their recipes.")],
    output: Annotated[Path, typer.Option(help="Folder to write: results.md with its plots, results.html.")] = Path(
        "docs"
    ),
) -> None:
    """Build the report of results from the rows of all experiments, as Markdown and as one HTML file."""
    from peerlm_studies.report.report import report

    for path in report(definition, output):
        typer.echo(path)


@app.command(epilog="Example: peerlm scaling results/isoflop.jsonl --output runs/law.json --plot runs/law.png")
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
    as_json: Json = False,
) -> None:
    """Fit a scaling law to each method's runs: constants with intervals, and how it predicts held-out runs."""
    from rich.markdown import Markdown

    from peerlm_studies.scaling.laws import law_markdown, plot_law, scaling

    law = scaling(rows, output, methods=method, hold_out=hold_out, up_to=up_to, times=draws)
    if plot is not None:
        plot_law(law).savefig(plot, dpi=130)
    if as_json:
        print_json(law)
    else:
        Console().print(Markdown(law_markdown(law)))


@app.command(epilog="Example: peerlm plan --flops 1e13 --memory 8GiB")
def plan(
    flops: Annotated[float, typer.Option(help="Training FLOPs to spend.")],
    memory: Annotated[str, typer.Option(help="Memory to train in, as in 80GiB.")] = "inf",
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    law: Annotated[
        Path | None, typer.Option(help="What `peerlm scaling` wrote; default: the law of docs/results.md.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Default: that of the law's runs.")] = None,
    context: Annotated[int | None, typer.Option(help="Default: that of the law's runs.")] = None,
    as_json: Json = False,
) -> None:
    """Say what to train for a budget: backbone, experts and tokens of least expected loss, and how sure that is."""
    from peerlm_studies.scaling.laws import DEFAULT_LAW, read_law
    from peerlm_studies.scaling.planner import plan_model, read_bytes

    budget: dict[str, Any] = {"flops": flops, "memory": read_bytes(memory)}
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "context": context}
    rows = [asdict(row) for row in plan_model(read_law(law or DEFAULT_LAW), method=method, **budget, **sizes)]
    if as_json:
        print_json(rows)
        return
    warnings = {row.pop("method"): row.pop("warnings") for row in rows}
    print_table(f"{flops:g} FLOPs", dict(zip(warnings, rows, strict=True)))
    for name, of_method in warnings.items():
        for warning in of_method:
            typer.echo(f"{name}: {warning}", err=True)


@app.command(
    epilog="Examples: peerlm neurons runs/dense --text book.txt --output runs/neurons\n\n"
    "peerlm neurons runs/dense --data data/books --output runs/neurons --finetune 0.2 --flops 1e12"
)
def neurons(
    run: Run,
    output: Annotated[Path, typer.Option(help="Folder to write; rows that are there are not measured again.")],
    text: Annotated[list[Path], typer.Option(help="Text to learn from; its last fifth is held out. Repeatable.")] = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="Prepared folder to learn from, in place of text.")] = None,
    heads: Annotated[int, typer.Option(help="Heads of each index.")] = 8,
    key_dim: Annotated[int, typer.Option(help="Size of a head's query.")] = 16,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows to measure on.")] = 128,
    fit_steps: Annotated[int, typer.Option(min=0, help="Batches from which each index is learned.")] = 300,
    finetune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Finetune with this share of the neurons, not the report.")
    ] = None,
    flops: Annotated[list[float], typer.Option(help="Budget of finetuning; repeatable.")] = [0.0, 1e12],  # noqa: B006
    learning_rate: Annotated[list[float], typer.Option(help="Peak rate of finetuning; repeatable.")] = [1e-3],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Retrieve a dense model's neurons by a learned index: how few of them suffice, and how that finetunes."""
    from peerlm_studies.neurons.finetune import finetune_neurons
    from peerlm_studies.neurons.measure import measure_neurons

    options: dict[str, Any] = {
        "text": text,
        "data": data,
        "settings": {"heads": heads, "key_dim": key_dim},
        "windows": windows,
        "fit_steps": fit_steps,
        "progress": not as_json,
    }
    if finetune is not None:
        rows = finetune_neurons(run, output, share=finetune, flops=flops, learning_rates=learning_rate, **options)
        columns = {f"{row['start']}, {row['flops']:.3g} FLOPs, rate {row['learning_rate']}": row for row in rows}
        shown = ["perplexity", "train_tokens", "total_parameters", "seconds"]
        result: object = rows
    else:
        report = measure_neurons(run, output, **options)
        columns = {f"{row['retrieval']} {row['share']:.0%}": row for row in report["rows"]}
        shown = ["perplexity", "dense_perplexity", "flops_per_token"]
        result = report
    if as_json:
        print_json(result)
        return
    print_table(str(run), transposed(columns, shown))
    if finetune is None:
        print_table("smallest share within an increase of perplexity", report["smallest_shares"])


@app.command(
    epilog="Examples: peerlm lifelong recipes/lifelong.toml\n\n"
    "peerlm lifelong recipes/lifelong.toml --set lifelong.seeds=[0] --output runs/one-seed"
)
def lifelong(
    recipe: Recipe,
    settings: Settings = [],  # noqa: B006
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Let models of one domain learn others by each method: what is learned against what is forgotten."""
    from peerlm_studies.lifelong.study import lifelong

    result = lifelong(recipe, overrides(settings, output), progress=not as_json)
    if as_json:
        print_json(result)
