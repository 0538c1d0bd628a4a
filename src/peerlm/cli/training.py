"""Commands from text to a trained model, and what it is worth: prepare, train, eval, generate."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.cli.root import Json, Output, Packs, Run, Settings, app, overrides
from peerlm.cli.show import print_json, print_table
from peerlm.errors import UserError


@app.command(
    epilog="Examples: peerlm prepare demo --output data/demo\n\n"
    "peerlm prepare books/ more.jsonl.xz --output data/books --vocab-size 16384"
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
    as_json: Json = False,
) -> None:
    """Turn text into tokens: train a tokenizer, hold out documents, write shards and their hashes.

    Files of a folder are read where their names end in .txt, .md, .rst, .jsonl, .parquet and the like; the others are
    passed over, and counted. Of a single document the end is held out. `peerlm train FOLDER` trains on the result.
    """
    from peerlm.data import prepare
    from peerlm.data.text_files import tally

    manifest = prepare(
        sources,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        holdout=holdout,
        seed=seed,
        text_field=text_field,
        progress=not as_json,
    )
    if as_json:
        print_json(asdict(manifest))
    else:
        sizes = ("documents", "tokens", "bytes")
        splits = {name: {size: vars(split)[size] for size in sizes} for name, split in manifest.splits.items()}
        print_table(f"{output}: {manifest.vocab_size:,} tokens in the vocabulary", splits)
        for what, counts in (manifest.files or {}).items():
            typer.echo(f"{what.replace('_', ' ')}: {tally(counts)}")
        typer.echo(f"Train on it: peerlm train {shlex.quote(str(output))}")


@app.command(
    epilog="Examples: peerlm train recipes/demo.toml --set optim.learning_rate=2e-3 --output runs/a\n\n"
    "peerlm train runs/a/config.json --resume"
)
def train(
    recipe: Annotated[
        Path, typer.Argument(help="TOML file, the config.json of a run, or a folder that peerlm prepare wrote.")
    ],
    settings: Settings = [],  # noqa: B006, typer makes a new list for each call
    output: Output = None,
    grow: Annotated[
        str | None,
        typer.Option(metavar="N@SHARE,...", help="Grow to N sub-keys, N² experts, at a share of the run: 256@50%."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe; --resume takes a stopped run to the weights it would have had."""
    from peerlm.train import load_recipe, train

    growth = [] if grow is None else [f'grow.at="{grow}"']
    config = load_recipe(recipe, [*growth, *overrides(settings, output)])
    result = train(config, resume=resume, progress=not as_json)
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first process alone prints
        return
    if as_json:
        print_json({"run": str(result.run), **result.summary})
    else:
        print_table(str(result.run), {"value": result.summary})


@app.command(
    "eval",
    epilog="Examples: peerlm eval runs/a book.txt lambada.jsonl\n\npeerlm eval runs/a book.txt --limit 100000 --json -"
    "\n\npeerlm eval runs/a wiki.test.tokens --detokenize\n\npeerlm eval runs/a --tasks recipes/tasks/copa.yaml",
)
def evaluate(
    run: Run,
    files: Annotated[list[Path], typer.Argument(help="Text, or JSONL of documents or of LAMBADA's layout.")] = [],  # noqa: B006
    tasks: Annotated[
        list[str],
        typer.Option(metavar="TASK", help="A task file of lm-eval's, a folder of them, or its own task; repeatable."),
    ] = [],  # noqa: B006
    context: Annotated[int | None, typer.Option(help="Tokens read at once; default: as trained.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens by which the window moves.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Read only the start: tokens of each file, documents of each task.")
    ] = None,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="Put tokenised text (WikiText's ` @-@ `) back first.")
    ] = False,
    pack: Packs = [],  # noqa: B006
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - prints it, no table.")
    ] = None,
) -> None:
    """Measure perplexity, bits per byte, accuracy of last words (LAMBADA), use of the experts, and lm-eval's tasks."""
    from peerlm.evaluate import evaluate

    if tasks and not files and (detokenize or stride is not None):
        raise UserError("--stride and --detokenize are for files, and there are none; name one, or leave them out")
    to_stdout = json_file == Path("-")
    rows: dict[str, dict[str, Any]] = {}
    if files or not tasks:
        rows |= evaluate(
            run,
            files,
            context=context,
            stride=stride,
            limit=limit,
            detokenized=detokenize,
            packs=pack,
            progress=not to_stdout,
        )
    if tasks:
        from peerlm.evaluate.harness import evaluate_tasks

        rows |= evaluate_tasks(run, tasks, context=context, limit=limit, packs=pack)
    if to_stdout:
        print_json(rows)
        return
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(str(run), rows)


@app.command(
    epilog="Examples: peerlm generate runs/a 'Once upon a time'\n\n"
    "peerlm generate runs/a 'The capital of' --temperature 0 --tokens 20"
)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at the most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    pack: Packs = [],  # noqa: B006
) -> None:
    """Let a trained model go on from a prompt, printed while it is written."""
    from transformers import TextStreamer

    from peerlm.evaluate import load_model, sample_text

    model, tokenizer = load_model(run, pack)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    sample_text(model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed, streamer=streamer)
