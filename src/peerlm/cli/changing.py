"""Commands that change a trained model: convert, grow, shrink, pack."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peerlm.cli.root import Commands, DocumentStart, Json, app
from peerlm.cli.show import STDOUT, advance, show
from peerlm.errors import UserError
from peerlm.terminal import VALUE, print_table

if TYPE_CHECKING:
    from torch import Tensor, nn

HELD_OUT = 5
"""One window of the text in so many is not learned from, and measures what a conversion costs."""


@app.command(
    examples=[
        "peerlm convert gpt2/ gpt2-peer/ --set num_experts=16384",
        "peerlm convert runs/dense changed/ --mode replace --layers middle",
        "peerlm convert gpt2-peer/ gpt2-again/ --undo",
    ]
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
    text: Annotated[
        list[Path],
        typer.Option(
            help="Text from which --init neurons learns its index; its last fifth tells what that costs. Repeatable."
        ),
    ] = [],  # noqa: B006
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the new layers; repeatable.")
    ] = [],  # noqa: B006
    document_start: DocumentStart = "auto",
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    undo: Annotated[bool, typer.Option("--undo", help="Take away what was added beside.")] = False,
    json_file: Json = None,
) -> None:
    """Put PEER into a model of any architecture, beside its dense feed-forward layers or in their place."""
    from peerlm.cli.conversion_options import read_layers, read_settings
    from peerlm.convert.folder import convert_folder
    from peerlm.evaluate.loading import model_folder
    from peerlm.evaluate.progress import progress_bar
    from peerlm.evaluate.windows import batches_of

    folder = model_folder(model)
    windows = windows_of(folder, text, document_start)
    held_out = 0 if windows is None or len(windows) < 2 else max(1, len(windows) // HELD_OUT)
    with progress_bar(shown=json_file != STDOUT) as bar:
        row = convert_folder(
            folder,
            output,
            mode=mode,
            layers=read_layers(layers),
            init=init,
            settings=read_settings(settings),
            samples=None if windows is None else batches_of(windows[: len(windows) - held_out]),
            measure=partial(perplexity, windows[-held_out:]) if windows is not None and held_out else None,
            seed=seed,
            undo=undo,
            report=partial(advance, bar, {}),
        )
    _show_change(output, row, json_file)


@app.command(
    examples=[
        "peerlm grow runs/a grown/ --num-experts 65536",
        "peerlm grow runs/a grown/ --num-experts 65536 --keys crowded --text book.txt",
    ]
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
    document_start: DocumentStart = "auto",
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    json_file: Json = None,
) -> None:
    """Give the PEER layers of a trained model more experts, which leave its output as it is until they are let in."""
    from peerlm.evaluate.loading import model_folder
    from peerlm.growth.folder import grow_folder

    folder = model_folder(model)
    row = grow_folder(
        folder,
        output,
        num_experts,
        keys=keys,
        samples=samples_of(folder, text, document_start),
        opening=opening,
        renumber=renumber,
        seed=seed,
    )
    _show_change(output, row, json_file)


@app.command(examples=["peerlm shrink runs/a smaller/ --text book.txt"])
def shrink(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model with PEER layers, or a run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[list[Path], typer.Option(help="Text that tells which experts are used; repeatable.")],
    num_experts: Annotated[
        int | None, typer.Option(help="Of every PEER layer: a square; default: all that the text uses stay.")
    ] = None,
    document_start: DocumentStart = "auto",
    json_file: Json = None,
) -> None:
    """Take away the experts of a trained model that it does not use."""
    from peerlm.evaluate.loading import model_folder
    from peerlm.growth.folder import shrink_folder

    folder = model_folder(model)
    samples = samples_of(folder, text, document_start)
    assert samples is not None
    _show_change(output, shrink_folder(folder, output, num_experts, samples), json_file)


@app.command(name="convert-rows", examples=["peerlm convert-rows runs/a small/ --row-format int4"])
def convert_rows(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model with PEER layers, or a run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    row_format: Annotated[
        str, typer.Option(help="float32, bfloat16, int8, float8_e4m3fn, or int4 (groups of 32 with a scale).")
    ],
    json_file: Json = None,
) -> None:
    """Store the experts of a trained model in fewer bits, or in more."""
    from peerlm.convert.rows import convert_rows_of_folder
    from peerlm.evaluate.loading import model_folder

    _show_change(output, convert_rows_of_folder(model_folder(model), output, row_format), json_file)


def windows_of(folder: Path, text: list[Path], document_start: str) -> "Tensor | None":
    """Windows of these files, for the model in a folder; None without files. Says what begins them."""
    from peerlm.data.tokenizer import open_tokenizer
    from peerlm.evaluate.windows import text_windows
    from peerlm.marks import AUTO, marked, marks_in

    if not text and document_start != AUTO:
        raise UserError(f"--document-start is {document_start!r}, but no text is read; name one with --text")
    if not text:
        return None
    tokenizer = open_tokenizer(folder)
    marks = marks_in(folder, tokenizer, document_start)
    if marks.window_start:
        begins = marked(marks.window_start, tokenizer)
        typer.echo(f"note: each document and window begins with {begins} ({marks.source})", err=True)
    return text_windows(tokenizer, text, 256, marks)


def samples_of(folder: Path, text: list[Path], document_start: str) -> Iterable[dict[str, Any]] | None:
    """What a model reads of these files, as keyword arguments of forward passes; None without files."""
    from peerlm.evaluate.windows import batches_of

    windows = windows_of(folder, text, document_start)
    return None if windows is None else batches_of(windows)


def perplexity(windows: "Tensor", model: "nn.Module") -> float:
    """Of a model, on the first 64 of these windows."""
    from peerlm.evaluate import held_out_loss
    from peerlm.evaluate.likelihood import exp

    return exp(held_out_loss(model, windows, batch_size=8, limit=64))


def _show_change(output: Path, row: dict[str, Any], json_file: Path | None) -> None:
    shown = {**row, "layers": "\n".join(row["layers"])}
    if errors := shown.pop("layer_errors", None):
        shown["layer errors"] = "\n".join(f"{error:.3f}" for error in errors.values())  # in the order of layers
    show(row, json_file, partial(print_table, str(output), {VALUE: shown}))


pack_app = Commands()
app.add_typer(pack_app, name="pack", help="Look at packs: experts for one purpose, kept in a folder (docs/packs.md).")


@pack_app.command("inspect", examples=["peerlm pack inspect packs/law --for runs/a"])
def inspect_pack(
    folder: Annotated[Path, typer.Argument(help="Folder that save_pack wrote.")],
    run: Annotated[
        Path | None, typer.Option("--for", metavar="RUN", help="Say also whether this model takes the pack.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Show what a pack is, check its file, and with --for load it into a model to see whether it fits."""
    from peerlm.packs.files import read_manifest, read_tensors

    manifest = read_manifest(folder)
    read_tensors(folder, manifest)
    facts = asdict(manifest)
    if run is not None:
        from peerlm.evaluate import load_model

        load_model(run, [folder])
        facts["fits"] = str(run)
    show(facts, json_file, partial(print_table, str(folder), {VALUE: facts}))
