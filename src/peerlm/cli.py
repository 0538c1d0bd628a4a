"""The command `peerlm`: each function parses, imports lazily, and calls.

A mistake that the user can mend is one line on stderr and exit code 2; a bug shows its traceback.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from peerlm import __version__
from peerlm.errors import UserError

app = typer.Typer(
    epilog="Example: peerlm compare recipes/demo.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peerlm {__version__}")
        raise typer.Exit


Recipe = Annotated[Path, typer.Argument(help="TOML file, or the config.json of a run.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
]
Output = Annotated[Path | None, typer.Option(help="Folder to write; the same as --set run=FOLDER.")]
Run = Annotated[Path, typer.Argument(help="Run folder, or folder of a saved model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table, and no progress.")]
Packs = Annotated[
    list[Path], typer.Option("--pack", metavar="FOLDER", help="A pack to load into the model first; repeatable.")
]
Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def options(version: Version = False) -> None:
    """Train language models of a million single-neuron experts (PEER), and compare them with rivals."""


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
    holdout: Annotated[float, typer.Option(help="Share of the text, by bytes, to hold out in whole documents.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Chooses the documents that are held out.")] = 0,
    text_field: Annotated[str, typer.Option(help="Field of JSONL, parquet or data sets that is the text.")] = "text",
    as_json: Json = False,
) -> None:
    """Turn text into tokens: train a tokenizer, hold out documents, write shards and their hashes."""
    from peerlm.data import prepare

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
        _print_json(asdict(manifest))
    else:
        sizes = ("documents", "tokens", "bytes")
        splits = {name: {size: vars(split)[size] for size in sizes} for name, split in manifest.splits.items()}
        _print_table(f"{output}: {manifest.vocab_size:,} tokens in the vocabulary", splits)


@app.command(
    epilog="Examples: peerlm train recipes/demo.toml --set optim.learning_rate=2e-3 --output runs/a\n\n"
    "peerlm train runs/a/config.json --resume"
)
def train(
    recipe: Recipe,
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
    config = load_recipe(recipe, [*growth, *_overrides(settings, output)])
    result = train(config, resume=resume, progress=not as_json)
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first process alone prints
        return
    if as_json:
        _print_json({"run": str(result.run), **result.summary})
    else:
        _print_table(str(result.run), {"value": result.summary})


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
        _print_json(rows)
        return
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    _print_table(str(run), rows)


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
    from peerlm.experiments.comparison.compare import compare

    rows = compare(recipe, _overrides(settings, output), progress=not as_json)
    if as_json:
        _print_json(rows)


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
    from peerlm.experiments.isoflop.study import isoflop

    overrides = _overrides(settings, output)
    part: dict[str, Any] = {"methods": method, "budgets": budget, "sizes": size}
    if dry:
        from rich.markdown import Markdown

        from peerlm.experiments.isoflop.dry_run import dry_run, dry_run_markdown
        from peerlm.experiments.isoflop.plan import load_isoflop

        rows = dry_run(load_isoflop(recipe, overrides), gpu_tflops=gpu_tflops, utilisation=utilisation, **part)
        if not as_json:
            Console().print(Markdown(dry_run_markdown(rows)))
    else:
        rows = isoflop(recipe, overrides, **part, seeds=seed or None, progress=not as_json)
    if as_json:
        _print_json(rows)


@app.command(epilog="Example: peerlm report results/report.toml --output docs")
def report(
    definition: Annotated[Path, typer.Argument(help="TOML file that names sections, their rows and their recipes.")],
    output: Annotated[Path, typer.Option(help="Folder to write: results.md with its plots, results.html.")] = Path(
        "docs"
    ),
) -> None:
    """Build the report of results from the rows of all experiments, as Markdown and as one HTML file."""
    from peerlm.experiments.report.report import report

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
    draws: Annotated[int, typer.Option(min=20, help="Draws of the bootstrap.")] = 100,
    plot: Annotated[Path | None, typer.Option(help="Image to write: measured over expected loss.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a scaling law to each method's runs: constants with intervals, and how it predicts held-out runs."""
    from rich.markdown import Markdown

    from peerlm.experiments.scaling.laws import law_markdown, plot_law, scaling

    law = scaling(rows, output, methods=method, hold_out=hold_out, times=draws)
    if plot is not None:
        plot_law(law).savefig(plot, dpi=130)
    if as_json:
        _print_json(law)
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
    from peerlm.experiments.scaling.laws import DEFAULT_LAW, read_law
    from peerlm.experiments.scaling.planner import plan_model, read_bytes

    budget: dict[str, Any] = {"flops": flops, "memory": read_bytes(memory)}
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "context": context}
    rows = [asdict(row) for row in plan_model(read_law(law or DEFAULT_LAW), method=method, **budget, **sizes)]
    if as_json:
        _print_json(rows)
        return
    warnings = {row.pop("method"): row.pop("warnings") for row in rows}
    _print_table(f"{flops:g} FLOPs", dict(zip(warnings, rows, strict=True)))
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
    from peerlm.experiments.neurons.finetune import finetune_neurons
    from peerlm.experiments.neurons.measure import measure_neurons

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
        _print_json(result)
        return
    _print_table(str(run), _transposed(columns, shown))
    if finetune is None:
        _print_table("smallest share within an increase of perplexity", report["smallest_shares"])


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


@app.command(
    epilog="Examples: peerlm convert gpt2/ gpt2-peer/ --set num_experts=16384\n\n"
    "peerlm convert runs/a b/ --mode replace --layers middle"
)
def convert(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model, of any architecture, or a run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    mode: Annotated[str, typer.Option(help="beside: PEER is added to dense layers; replace: it takes their place.")] = (
        "beside"
    ),
    layers: Annotated[str, typer.Option(help="all, middle, or numbers as in 0,3,-1.")] = "all",
    init: Annotated[
        str, typer.Option(help="random experts, or with --mode replace the layer's own neurons, retrieved.")
    ] = "random",
    text: Annotated[list[Path], typer.Option(help="Text from which --init neurons learns its index; repeatable.")] = [],  # noqa: B006
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the new layers; repeatable.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    undo: Annotated[bool, typer.Option("--undo", help="Take away what was added beside.")] = False,
    as_json: Json = False,
) -> None:
    """Put PEER into a model of any architecture, beside its dense feed-forward layers or in their place."""
    from peerlm.evaluate.loading import model_folder
    from peerlm.evaluate.progress import progress_bar
    from peerlm.surgery.convert_folder import convert_folder
    from peerlm.surgery.settings import read_layers, read_settings

    folder = model_folder(model)
    samples = _samples(folder, text)
    with progress_bar(shown=not as_json) as bar:
        row = convert_folder(
            folder,
            output,
            mode=mode,
            layers=read_layers(layers),
            init=init,
            settings=read_settings(settings),
            samples=samples,
            seed=seed,
            undo=undo,
            report=partial(_advance, bar, {}),
        )
    if as_json:
        _print_json(row)
    else:
        _print_table(str(output), {"value": {**row, "layers": "\n".join(row["layers"])}})


@app.command(
    epilog="Examples: peerlm grow runs/a grown/ --num-experts 4096 --renumber\n\n"
    "peerlm grow runs/a grown/ --num-experts 4096 --keys crowded --text book.txt"
)
def grow(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model with PEER layers, or a run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_experts: Annotated[int, typer.Option(help="Of every PEER layer: a square, more than it has.")],
    keys: Annotated[
        str, typer.Option(help="Where new keys start: random, crowded (near those used most on --text), or data.")
    ] = "random",
    text: Annotated[list[Path], typer.Option(help="Text that --keys crowded or data looks at; repeatable.")] = [],  # noqa: B006
    opening: Annotated[float, typer.Option(help="How far new experts are let in; 0 keeps the output as it is.")] = 0.0,
    renumber: Annotated[
        bool, typer.Option("--renumber", help='Renumber a model of pairing "row-major" first.')
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Give the PEER layers of a trained model more experts, which leave its output as it is until they are let in."""
    from peerlm.evaluate.loading import model_folder
    from peerlm.surgery.resize_folder import grow_folder

    folder = model_folder(model)
    row = grow_folder(
        folder,
        output,
        num_experts,
        keys=keys,
        samples=_samples(folder, text),
        opening=opening,
        renumber=renumber,
        seed=seed,
    )
    _print_resized(output, row, as_json)


@app.command(epilog="Example: peerlm shrink runs/a smaller/ --text book.txt")
def shrink(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model with PEER layers, or a run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[list[Path], typer.Option(help="Text that tells which experts are used; repeatable.")],
    num_experts: Annotated[
        int | None, typer.Option(help="Of every PEER layer: a square; default: all that the text uses stay.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take away the experts of a trained model that it does not use."""
    from peerlm.evaluate.loading import model_folder
    from peerlm.surgery.resize_folder import shrink_folder

    folder = model_folder(model)
    samples = _samples(folder, text)
    assert samples is not None
    _print_resized(output, shrink_folder(folder, output, num_experts, samples), as_json)


def _samples(folder: Path, text: list[Path]) -> Iterable[dict[str, Any]] | None:
    """What a model reads of these files, as keyword arguments of forward passes; None without files."""
    from peerlm.data.tokenizer import open_tokenizer
    from peerlm.evaluate.windows import batches_of, text_windows

    return batches_of(text_windows(open_tokenizer(folder), text, context=256)) if text else None


def _print_resized(output: Path, row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(row)
    else:
        _print_table(str(output), {"value": {**row, "layers": "\n".join(row["layers"])}})


@app.command(
    epilog="Examples: peerlm learn runs/a --text code.txt.xz --output runs/learned --background prose.txt.xz --kl 1\n\n"
    "peerlm learn runs/a --text law=laws/ --text docs.txt --method grow --set sub_keys=32 --output runs/grown "
    "--background prose.txt.xz --kl 1\n\npeerlm learn runs/a --text code.txt.xz --method lora --set rank=32 "
    "--learning-rate 5e-3 --output runs/lora"
)
def learn(
    run: Run,
    text: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help="Text to learn, one stage each, in this order; repeatable."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="full: all weights; lora: low-rank matrices, merged after each stage; grow: new experts, the old ones "
            "frozen; pack: a folder of experts for each text, the model frozen; sparse: in each step the experts that "
            "its text uses more than the background does."
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
    tokens: Annotated[int | None, typer.Option(help="New tokens of each stage; default 120,000.")] = None,
    steps: Annotated[int | None, typer.Option(help="Or steps of each stage.")] = None,
    flops: Annotated[float | None, typer.Option(help="Or training FLOPs of each stage.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    table_lr_multiplier: Annotated[float, typer.Option(help="Learning rate of experts over that of the rest.")] = 1.0,
    keys_lr_multiplier: Annotated[float, typer.Option(help="Learning rate of sub-keys over that of the rest.")] = 1.0,
    context: Annotated[int | None, typer.Option(help="Tokens in a window; default: as trained.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of new text in a step.")] = 8,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only when stopped.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the order of the text and of new weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Let a trained model learn text after text, and show after each what it knows of all of them.

    Learning makes a model forget. What helps against that, in any combination: text of what it knows, --background,
    from whose predictions it shall not move away, --kl, or which it learns again, --replay; and methods that change
    only part of it. Rows of the table are stages, columns perplexities of held-out text of each domain.
    """
    from peerlm.learn.command import learn_config
    from peerlm.learn.stream import learn

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
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    rows = learn(config, resume=resume, progress=not as_json)
    if as_json:
        _print_json(rows)
        return
    _print_table(
        str(output),
        _transposed(
            {f"after {row['stage'] or 'nothing'}": row["perplexity"] for row in rows}, list(rows[0]["perplexity"])
        ),
    )


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
    from peerlm.experiments.lifelong.study import lifelong

    result = lifelong(recipe, _overrides(settings, output), progress=not as_json)
    if as_json:
        _print_json(result)


pack_app = typer.Typer(no_args_is_help=True)
app.add_typer(pack_app, name="pack", help="Look at packs: experts for one purpose, kept in a folder (docs/packs.md).")


@pack_app.command("inspect", epilog="Example: peerlm pack inspect packs/law")
def inspect_pack(
    folder: Annotated[Path, typer.Argument(help="Folder that save_pack wrote.")],
    run: Annotated[
        Path | None, typer.Option("--for", metavar="RUN", help="Say also whether this model takes the pack.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a pack is, check its file, and with --for load it into a model to see whether it fits."""
    from peerlm.surgery.pack_files import read_manifest, read_tensors

    manifest = read_manifest(folder)
    read_tensors(folder, manifest)
    facts = asdict(manifest)
    if run is not None:
        from peerlm.evaluate import load_model

        load_model(run, [folder])
        facts["fits"] = str(run)
    if as_json:
        _print_json(facts)
    else:
        _print_table(str(folder), {"value": facts})


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
    from peerlm.inspect import Edit, change_of_edits, inspect

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
        _print_json(figures)
    elif wanted:
        shown_figures = ["tokens", "loss", "edited_loss", "change", "perplexity", "edited_perplexity"]
        _print_table(str(run), {"value": {name: figures[name] for name in shown_figures}})
        for place in figures["places"]:
            columns = {"as it is": place["before_edit"], "edited": place["after_edit"]}
            ranks = {
                name: {str(rank): f"{token!r} {share:.1%}" for rank, (token, share) in enumerate(tokens, start=1)}
                for name, tokens in columns.items()
            }
            _print_table(f"after {place['after']!r}, divergence {place['divergence']:.3g} nats", ranks)
    else:
        layers = {f"layer {layer['number']}": layer for layer in figures["layers"]}
        columns = _transposed(layers, ["num_experts", "usage", "unevenness", "dead", "crowded"])
        _print_table(f"{output}: loss {figures['loss']:.4f} over {figures['tokens']:,} tokens", columns)


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
        _print_json({**facts, "backends": backends})
    else:
        _print_table("", {"value": facts | {f"backend {name}": what for name, what in backends.items()}})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, by default the process's, and exit with its code.

    2 stands for a mistake of the user's, 130 for an interrupt; an exception's own `exit_code` is honoured.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, between ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(arguments)
    except Exception as error:
        is_mistake = isinstance(error, UserError | OSError)
        exit_code = 2 if is_mistake else getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        typer.echo(f"error: {_sentence(error)}" if is_mistake else str(error), err=True)
        sys.exit(exit_code)


def _advance(bar: Progress, tasks: dict[str, TaskID], name: str, done: int, total: int) -> None:
    """Show how far the work of this name is."""
    if name not in tasks:
        tasks[name] = bar.add_task(name, total=total)
    bar.update(tasks[name], completed=done)


def _sentence(error: Exception) -> str:
    """One line about an error, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _overrides(settings: Sequence[str], output: Path | None) -> list[str]:
    """The changes to a recipe; the folder is quoted as TOML quotes strings."""
    return [*settings, *([f"run={json.dumps(str(output))}"] if output else [])]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print named columns, with a row for each key that any of them has."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    table = Table("", *columns, title=title or None, title_justify="left")
    for key in keys:
        table.add_row(key.replace("_", " "), *(_cell(column.get(key, "")) for column in columns.values()))
    Console().print(table)


def _transposed(columns: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """These keys as columns, with a row for each column."""
    return {key.replace("_", " "): {name: column[key] for name, column in columns.items()} for key in keys}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_cell(part)}" for key, part in value.items())
    return f"{value:,}" if type(value) is int else str(value)
