"""The command that lets a trained model learn new text: learn."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.cli.root import DocumentStart, Json, Resume, Run, app, read_resume
from peerlm.cli.show import STDOUT, show
from peerlm.terminal import print_table


@app.command(
    examples=[
        "peerlm learn runs/a --text code.txt --output runs/learned",
        "peerlm learn runs/a --text law=laws/ --text docs.txt --method grow -o runs/b",
        "peerlm learn runs/a --text code.txt --background book.txt --kl 1 -o runs/b",
        "peerlm learn runs/a --text code.txt --method lora --set rank=8 -o runs/b",
        "peerlm learn my-model --text docs/ --method pack -o runs/docs",
        "peerlm learn runs/a --text code.txt --output runs/learned --resume",
    ]
)
def learn(
    run: Run,
    text: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help="Text to learn, one stage each, in this order; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="full: all weights; lora: low-rank matrices, merged after each stage; grow: new experts, the old ones "
            "frozen; pack: a folder of experts for each text, beside any model, which is frozen; pool: one adapter of "
            "experts beside any model, likewise; sparse: in each step the experts that its text uses more than the "
            "background does."
        ),
    ] = "full",
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; repeatable.")
    ] = [],  # noqa: B006
    heldout: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help="What to measure the text NAME on, or the background; default: documents held out of it. Repeatable.",
        ),
    ] = [],  # noqa: B006
    background: Annotated[
        list[str], typer.Option(metavar="FILE", help="Text like that which the model was trained on; repeatable.")
    ] = [],  # noqa: B006
    kl: Annotated[
        float, typer.Option(help="Weight of the divergence from the model before the stage, on the background.")
    ] = 0.0,
    kl_windows: Annotated[int, typer.Option(help="Windows of background in each step for --kl.")] = 4,
    replay: Annotated[
        float, typer.Option(help="Windows of background that are learned again, for each new window.")
    ] = 0.0,
    remember: Annotated[
        int, typer.Option(help="Windows of each finished stage that join the background for --kl and --replay.")
    ] = 256,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="New tokens of each stage; default 120,000; of lora, pack and pool beside plain models, each text "
            "once."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or steps of each stage.")] = None,
    flops: Annotated[float | None, typer.Option(help="Or training FLOPs of each stage.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    table_lr_multiplier: Annotated[
        float,
        typer.Option(help="Learning rate of experts over that of the rest; of some packs, times the setting `rate`."),
    ] = 1.0,
    keys_lr_multiplier: Annotated[float, typer.Option(help="Learning rate of sub-keys over that of the rest.")] = 1.0,
    context: Annotated[int | None, typer.Option(help="Tokens in a window; default: as trained.")] = None,
    document_start: DocumentStart = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows of new text in a step.")] = 8,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none by steps.")] = 0,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0: none by time.")] = 5.0,
    precision: Annotated[
        str,
        typer.Option(
            help="Of matrix products in training: fp32, bf16, or auto, which is bf16 for lora, pack and pool of a "
            "model without experts, on a processor that has it."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of the text and of new weights.")] = 0,
    resume: Resume = None,
    json_file: Json = None,
) -> None:
    """Let a trained model learn text after text, and show after each what it knows of all of them.

    Learning makes a model forget. What helps against that, in any combination: text of what it knows, --background,
    whose predictions it keeps, --kl, or which it learns again, --replay; and methods that change
    only part of it. Rows of the table are stages, columns perplexities of held-out text of each domain.
    """
    from peerlm.cli.stage_options import learn_config
    from peerlm.continual.stream import learn

    config = learn_config(
        run=str(output),
        model=str(run),
        text=text,
        heldout=heldout,
        method=method,
        settings=settings,
        memory={
            "background": background,
            "kl": kl,
            "kl_windows": kl_windows,
            "replay": replay,
            "remember": remember,
        },
        budget={"tokens": tokens, "steps": steps, "flops": flops},
        optim={
            "learning_rate": learning_rate,
            "table_lr_multiplier": table_lr_multiplier,
            "keys_lr_multiplier": keys_lr_multiplier,
        },
        context=context,
        document_start=document_start,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        precision=precision,
        seed=seed,
    )
    rows = learn(config, resume=read_resume(resume), progress=json_file != STDOUT)
    if begins := rows[0].get("document_start"):
        typer.echo(f"note: each document and window begins with {begins}", err=True)
    if precision == "auto" and rows[0].get("precision") == "bf16":
        typer.echo(
            "note: training multiplied matrices in bfloat16; --precision fp32 does not, and takes longer", err=True
        )
    show(rows, json_file, partial(_print, output, rows))


def _print(output: Path, rows: list[dict[str, Any]]) -> None:
    """Perplexities after each stage; the loss of each text before and after all; where packs are."""
    from peerlm.continual.stream import before_and_after

    stages = {f"after {row['stage'] or 'nothing'}": row["perplexity"] for row in rows}
    print_table(str(output), stages, rows=True)
    print_table("loss on held-out text, nats per token", before_and_after(rows), rows=True)
    for folder in sorted(output.glob("stages/*/pack")):
        size = sum(path.stat().st_size for path in folder.iterdir())
        typer.echo(f"{size / 1e6:.1f} MB: load it with --pack {folder}")
