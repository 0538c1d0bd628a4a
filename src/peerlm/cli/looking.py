"""Commands that look: into a model, and at this installation: inspect, info."""

import platform
from pathlib import Path
from typing import Annotated

import typer

from peerlm import __version__
from peerlm.cli.root import Json, Run, app
from peerlm.cli.show import print_json, print_table, transposed
from peerlm.errors import UserError


@app.command(
    epilog="Examples: peerlm inspect runs/a --text book.txt --output experts.html\n\n"
    "peerlm inspect runs/a --text book.txt --knock-out 1:123 --boost 1:77=2"
)
def inspect(
    run: Run,
    text: Annotated[Path, typer.Option(help="Text, JSONL or parquet file to read with the model.")],
    output: Annotated[Path | None, typer.Option(help="Page to write; default: inspect.html.")] = None,
    limit: Annotated[int, typer.Option(help="Read only the start: tokens.")] = 65536,
    shown: Annotated[int, typer.Option(help="Tokens at the start that the page shows one by one.")] = 512,
    context: Annotated[int | None, typer.Option(help="Tokens read at once; default: as trained.")] = None,
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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE too; - prints them.")
    ] = None,
) -> None:
    """Look inside: which experts fire where, what they push, which are dead or crowded, what changes without them.

    Writes one HTML page that works offline. With --knock-out or --boost it prints instead how the loss and the next
    tokens change with all these edits at once. A layer is named by its block's number, as on the page.
    """
    from peerlm.files import write_json
    from peerlm.interpret import Edit, change_of_edits, inspect

    to_stdout = json_file == Path("-")
    wanted = [*(Edit.read(name, 0.0) for name in knock_out), *(Edit.read(name) for name in boost)]
    if wanted and output is not None:
        raise UserError("--knock-out and --boost print and write no page; leave --output out")
    output = output or Path("inspect.html")
    if wanted:
        figures = change_of_edits(run, text, wanted, limit=limit, context=context, progress=not to_stdout)
    else:
        figures = inspect(
            run,
            text,
            output=output,
            limit=limit,
            shown=shown,
            context=context,
            experts=experts,
            edits=edits,
            progress=not to_stdout,
        )
    if json_file is not None and not to_stdout:
        write_json(json_file, figures)
    if to_stdout:
        print_json(figures)
    elif wanted:
        shown_figures = ["tokens", "loss", "edited_loss", "change", "perplexity", "edited_perplexity"]
        print_table(str(run), {"value": {name: figures[name] for name in shown_figures}})
        for place in figures["places"]:
            columns = {"as it is": place["before_edit"], "edited": place["after_edit"]}
            ranks = {
                name: {str(rank): f"{token!r} {share:.1%}" for rank, (token, share) in enumerate(tokens, start=1)}
                for name, tokens in columns.items()
            }
            print_table(f"after {place['after']!r}, divergence {place['divergence']:.3g} nats", ranks)
    else:
        layers = {f"layer {layer['number']}": layer for layer in figures["layers"]}
        columns = transposed(layers, ["num_experts", "usage", "unevenness", "dead", "crowded"])
        print_table(f"{output}: loss {figures['loss']:.4f} over {figures['tokens']:,} tokens", columns)


@app.command(epilog="Example: peerlm info --json")
def info(as_json: Json = False) -> None:
    """Show versions, devices and backends, as a bug report wants them."""
    import torch
    import transformers

    from peerlm.ops.api import available_backends

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "peerlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *gpus],
    }
    backends = available_backends()
    if as_json:
        print_json({**facts, "backends": backends})
    else:
        print_table("", {"value": facts | {f"backend {name}": what for name, what in backends.items()}})
