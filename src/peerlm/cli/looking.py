"""Commands that look into a model, and at this installation: inspect, info."""

import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm import __version__
from peerlm.cli.root import DocumentStart, Json, PackFolders, Run, app
from peerlm.cli.show import STDOUT, show
from peerlm.errors import UserError
from peerlm.terminal import VALUE, print_table


@app.command(
    examples=[
        "peerlm inspect runs/a --text book.txt --output experts.html",
        "peerlm inspect runs/a --text book.txt --knock-out 1:123 --boost 1:77=2",
        "peerlm inspect my-model --text a.txt --pack learned/stages/1-docs/pack",
    ]
)
def inspect(
    run: Run,
    text: Annotated[Path, typer.Option(help="Text, JSONL or parquet file to read with the model.")],
    output: Annotated[Path | None, typer.Option(help="Page to write; default: inspect.html.")] = None,
    limit: Annotated[int, typer.Option(help="Read only the start: tokens.")] = 65536,
    shown: Annotated[int, typer.Option(help="Tokens at the start that the page shows one by one.")] = 512,
    context: Annotated[int | None, typer.Option(help="Tokens read at once; default: as trained.")] = None,
    document_start: DocumentStart = "auto",
    pack: PackFolders = [],  # noqa: B006
    experts: Annotated[int, typer.Option(help="Experts of each layer that the page holds, those that write most.")] = (
        16384
    ),
    edits: Annotated[int, typer.Option(help="Experts whose knock-out and doubling are measured for the page.")] = 64,
    knock_out: Annotated[
        list[str],
        typer.Option(metavar="LAYER:EXPERT", help="Print what changes without this expert; repeatable, no page."),
    ] = [],  # noqa: B006
    boost: Annotated[
        list[str],
        typer.Option(metavar="LAYER:EXPERT=FACTOR", help="The same with its output multiplied; repeatable, no page."),
    ] = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that is there.")] = False,
    json_file: Json = None,
) -> None:
    """Look inside: which experts fire where, what they push, which are dead or crowded, what changes without them.

    Writes one HTML page that works offline. With --knock-out or --boost it prints instead how the loss and the next
    tokens change with all these edits at once. A layer is named by its block's number, as on the page.
    """
    from peerlm.interpret import Edit, change_of_edits, inspect

    progress = json_file != STDOUT
    wanted = [*(Edit.read(name, 0.0) for name in knock_out), *(Edit.read(name) for name in boost)]
    if wanted and output is not None:
        raise UserError("--knock-out and --boost print and write no page; leave --output out")
    output = output or Path("inspect.html")
    if wanted:
        figures = change_of_edits(
            run,
            text,
            wanted,
            limit=limit,
            context=context,
            document_start=document_start,
            packs=pack,
            progress=progress,
        )
    else:
        figures = inspect(
            run,
            text,
            output=output,
            overwrite=overwrite,
            limit=limit,
            shown=shown,
            context=context,
            document_start=document_start,
            packs=pack,
            experts=experts,
            edits=edits,
            progress=progress,
        )
    tables = _print_change if wanted else _print_layers
    show(figures, json_file, partial(tables, str(run if wanted else output), figures))


def _print_change(run: str, figures: Mapping[str, Any]) -> None:
    """What edits change: the loss, and the next tokens where they change most."""
    shown = ["document_start", "tokens", "loss", "edited_loss", "change", "perplexity", "edited_perplexity"]
    print_table(run, {VALUE: {name: figures[name] for name in shown}})
    for place in figures["places"]:
        columns = {"as it is": place["before_edit"], "edited": place["after_edit"]}
        ranks = {
            name: {str(rank): f"{token!r} {share:.1%}" for rank, (token, share) in enumerate(tokens, start=1)}
            for name, tokens in columns.items()
        }
        print_table(f"after {place['after']!r}, divergence {place['divergence']:.3g} nats", ranks)


def _print_layers(page: str, figures: Mapping[str, Any]) -> None:
    """How each layer uses its experts."""
    names = ["num_experts", "usage", "unevenness", "dead", "crowded"]
    layers = {f"layer {layer['number']}": {name: layer[name] for name in names} for layer in figures["layers"]}
    begins = f"documents begin with {figures['document_start'] or 'nothing'}"
    title = f"{page}: loss {figures['loss']:.4f} over {figures['tokens']:,} tokens, {begins}"
    print_table(title, layers, rows=True)


@app.command(examples=["peerlm info", "peerlm info --json -"])
def info(json_file: Json = None) -> None:
    """Show versions, devices and backends, as a bug report wants them."""
    import torch
    import transformers

    from peerlm.ops.api import available_backends, updates_rows_on
    from peerlm.ranks import automatic_device
    from peerlm.train.captured import GRAPHS

    device = automatic_device()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "peerlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *gpus],
        "device in use": f"{device}, unless device says otherwise",
        "updates of tables": "by kernels, of retrieved rows" if updates_rows_on(device) else "by PyTorch, of all rows",
        "steps of training": "in CUDA graphs, where graph = 'auto' can" if device.type in GRAPHS else "eager",
    }
    backends = available_backends()
    shown = facts | {f"backend {name}": what for name, what in backends.items()}
    show({**facts, "backends": backends}, json_file, partial(print_table, "", {VALUE: shown}))
