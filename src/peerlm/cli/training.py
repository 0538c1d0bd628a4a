"""Commands from text to a trained model and its evaluation: prepare, train, eval, generate."""

import os
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.cli.root import (
    DeviceRows,
    DocumentStart,
    Json,
    Output,
    PackFolders,
    Resume,
    Run,
    Settings,
    app,
    overrides,
    read_resume,
)
from peerlm.cli.show import STDOUT, show
from peerlm.errors import TrainingStopped, UserError
from peerlm.terminal import VALUE, print_table


@app.command(
    examples=[
        "peerlm prepare demo --output data/demo",
        "peerlm prepare books/ more.jsonl.xz --output data/books --vocab-size 16384",
    ]
)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Text, JSONL or parquet files, folders, hf:NAME[:CONFIG[:SPLIT]], or the word demo."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Take the tokenizer in this file or folder; train none.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary to train.")] = 4096,
    holdout: Annotated[
        float,
        typer.Option(help="Share of the text, by bytes, to hold out in whole documents; of a single one, its end."),
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Chooses the documents that are held out.")] = 0,
    text_field: Annotated[str, typer.Option(help="Field of JSONL, parquet or data sets that is the text.")] = "text",
    document_start: DocumentStart = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize; the result does not depend on it.")] = 1,
    json_file: Json = None,
) -> None:
    """Turn text into tokens: train a tokenizer, hold out documents, write shards and their hashes.

    Files of a folder are read where their names end in .txt, .md, .rst, .jsonl, .parquet and the like; the others are
    passed over, and counted. Of a single document the end is held out. `peerlm train FOLDER` trains on the result.
    """
    from peerlm.data import load_tokenizer, prepare
    from peerlm.data.text_files import tally
    from peerlm.marks import marked

    manifest = prepare(
        sources,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        holdout=holdout,
        seed=seed,
        text_field=text_field,
        document_start=document_start,
        workers=workers,
        progress=json_file != STDOUT,
    )
    if manifest.document_start:
        begins = marked(manifest.document_start, load_tokenizer(output))
        typer.echo(f"note: each document and window begins with {begins}", err=True)

    def tables() -> None:
        sizes = ("documents", "tokens", "bytes")
        splits = {name: {size: vars(split)[size] for size in sizes} for name, split in manifest.splits.items()}
        print_table(f"{output}: {manifest.vocab_size:,} tokens in the vocabulary", splits)
        for what, counts in (manifest.files or {}).items():
            typer.echo(f"{what.replace('_', ' ')}: {tally(counts)}")
        typer.echo(f"Train on it: peerlm train {shlex.quote(str(output))}")

    show(asdict(manifest) if json_file else None, json_file, tables)


@app.command(
    examples=[
        "peerlm open-shards web.bin --tokenizer tokenizer.json --output data/web",
        "peerlm open-shards web/ --heldout test.ds --tokenizer gpt2/ --output data/web",
    ]
)
def open_shards(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Megatron-LM's .bin, datatrove's .ds, .parquet, folders of save_to_disk or of such files."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="File or folder of the tokenizer that made the tokens.")],
    heldout: Annotated[list[Path], typer.Option(help="Token files to hold out; repeatable.")] = [],  # noqa: B006
    holdout: Annotated[float, typer.Option(help="Share of the tokens to hold out, the last documents.")] = 0.02,
    field: Annotated[str, typer.Option(help="Column of token ids in data sets and parquet files.")] = "input_ids",
    json_file: Json = None,
) -> None:
    """Make a folder to train on from token files that others made, without rewriting them.

    All tokens are read once and must be the tokenizer's. The files stay where they are, and must not change.
    """
    from peerlm.data import open_shards

    manifest = open_shards(
        sources,
        output,
        tokenizer=tokenizer,
        heldout=heldout,
        holdout=holdout,
        field=field,
        progress=json_file != STDOUT,
    )

    def tables() -> None:
        sizes = ("documents", "tokens")
        splits = {name: {size: vars(split)[size] for size in sizes} for name, split in manifest.splits.items()}
        print_table(f"{output}: {manifest.vocab_size:,} tokens in the vocabulary", splits)
        typer.echo(f"Train on it: peerlm train {shlex.quote(str(output))}")

    show(asdict(manifest) if json_file else None, json_file, tables)


@app.command(
    examples=[
        "peerlm train recipes/train-demo.toml --output runs/a",
        "peerlm train recipes/train-demo.toml --set budget.minutes=1",
        "peerlm train runs/a --resume",
        "torchrun --nproc-per-node 2 -m peerlm train recipe.toml --resume=auto",
    ]
)
def train(
    recipe: Annotated[
        Path, typer.Argument(help="TOML file, a run or its config.json, or a folder that peerlm prepare wrote.")
    ],
    settings: Settings = [],  # noqa: B006, typer makes a new list for each call
    output: Output = None,
    grow: Annotated[
        str | None,
        typer.Option(metavar="N@SHARE,...", help="Grow to N sub-keys, N² experts, at a share of the run: 256@50%."),
    ] = None,
    resume: Resume = None,
    json_file: Json = None,
) -> None:
    """Train a model from a recipe; --resume continues a stopped run to the same weights.

    Under torchrun, processes train one model together; with --resume=auto a restart of the same command resumes.
    """
    from peerlm.train import load_recipe, train
    from peerlm.train.run_folder import resume_command

    growth = [] if grow is None else [f'grow.at="{grow}"']
    config = load_recipe(recipe, [*growth, *overrides(settings, output)])
    try:
        result = train(config, resume=read_resume(resume), progress=json_file != STDOUT)
    except TrainingStopped as stopped:
        stopped.resume = resume_command(Path(config.run))
        raise
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first process alone prints
        return
    figures = {"run": str(result.run), **result.summary}
    show(figures, json_file, partial(print_table, str(result.run), {VALUE: result.summary}))


@app.command(
    "eval",
    examples=[
        "peerlm eval runs/a",
        "peerlm eval runs/a book.txt lambada.jsonl",
        "peerlm eval runs/a book.txt --limit 100000 --json -",
        "peerlm eval runs/a wiki.test.tokens --detokenize",
        "peerlm eval runs/a book.txt --copying",
        "peerlm eval runs/a --tasks recipes/tasks/copa.yaml --task-data tasks/",
        "peerlm eval my-model --tasks recipes/tasks/piqa.yaml --task-data tasks/ --chat",
    ],
)
def evaluate(
    run: Run,
    files: Annotated[
        list[Path],
        typer.Argument(help="Text, or JSONL of documents or of LAMBADA's layout; default: what was held out."),
    ] = [],  # noqa: B006
    tasks: Annotated[
        list[str],
        typer.Option(metavar="TASK", help="A task file of lm-eval's, a folder of them, or its own task; repeatable."),
    ] = [],  # noqa: B006
    task_data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the data of --tasks are; default: here.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens read at once; default: as trained.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens by which the window moves.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Read only the start: tokens of each file, documents of each task.")
    ] = None,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="Put tokenised text (WikiText's ` @-@ `) back first.")
    ] = False,
    copying: Annotated[
        bool, typer.Option("--copying", help="Measure too what the model copies from its context.")
    ] = False,
    document_start: DocumentStart = "auto",
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the questions of --tasks in the tokenizer's chat template.")
    ] = False,
    pack: PackFolders = [],  # noqa: B006
    device_rows: DeviceRows = 0,
    json_file: Json = None,
) -> None:
    """Measure perplexity, bits per byte, accuracy of last words (LAMBADA), use of the experts, and lm-eval's tasks."""
    from peerlm.evaluate import evaluate

    if tasks and not files and (detokenize or copying or stride is not None):
        raise UserError(
            "--stride, --detokenize and --copying are for files, and there are none; name one, or leave them out"
        )
    if chat and not tasks:
        raise UserError("--chat is for the questions of --tasks, and there are none: name a task, or leave out --chat")
    rows: dict[str, dict[str, Any]] = {}
    if files or not tasks:
        rows |= evaluate(
            run,
            files,
            context=context,
            stride=stride,
            limit=limit,
            detokenized=detokenize,
            copying=copying,
            document_start=document_start,
            packs=pack,
            device_rows=device_rows,
            progress=json_file != STDOUT,
        )
    if tasks:
        from peerlm.evaluate.harness import evaluate_tasks

        rows |= evaluate_tasks(
            run,
            tasks,
            context=context,
            limit=limit,
            packs=pack,
            device_rows=device_rows,
            document_start=document_start,
            chat=chat,
            task_data=task_data,
        )
    for note in dict.fromkeys(note for row in rows.values() for note in row.get("notes", [])):
        typer.echo(f"note: {note}", err=True)
    shown = {name: {key: value for key, value in row.items() if key != "notes"} for name, row in rows.items()}
    show(rows, json_file, partial(print_table, str(run), shown))


@app.command(
    examples=[
        "peerlm generate runs/a 'Once upon a time'",
        "peerlm generate runs/a 'The capital of' --temperature 0 --tokens 20",
        "peerlm generate my-model 'What is gravity?' --chat",
    ]
)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at the most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from this many likeliest tokens; default: from all.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that together are at least this probable, 0 to 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    document_start: DocumentStart = "auto",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message of the tokenizer's chat template.")
    ] = False,
    pack: PackFolders = [],  # noqa: B006
    device_rows: DeviceRows = 0,
) -> None:
    """Let a trained model continue a prompt, or answer a message, printed while it is written."""
    from transformers import TextStreamer

    from peerlm.evaluate import load_model, notes_on_generation, sample_text

    model, tokenizer = load_model(run, pack, device_rows=device_rows)
    for note in notes_on_generation(model, tokenizer, document_start, chat=chat):
        typer.echo(f"note: {note}", err=True)
    sample_text(
        model,
        tokenizer,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        document_start=document_start,
        chat=chat,
        streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
    )
