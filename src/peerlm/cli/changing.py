"""Commands that change a trained model: convert, grow, shrink, pack."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.cli.root import Json, app
from peerlm.cli.show import advance, print_json, print_table


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
    from peerlm.cli.conversion_options import read_layers, read_settings
    from peerlm.convert.folder import convert_folder
    from peerlm.evaluate.loading import model_folder
    from peerlm.evaluate.progress import progress_bar

    folder = model_folder(model)
    samples = samples_of(folder, text)
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
            report=partial(advance, bar, {}),
        )
    _print_change(output, row, as_json)


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
    from peerlm.growth.folder import grow_folder

    folder = model_folder(model)
    row = grow_folder(
        folder,
        output,
        num_experts,
        keys=keys,
        samples=samples_of(folder, text),
        opening=opening,
        renumber=renumber,
        seed=seed,
    )
    _print_change(output, row, as_json)


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
    from peerlm.growth.folder import shrink_folder

    folder = model_folder(model)
    samples = samples_of(folder, text)
    assert samples is not None
    _print_change(output, shrink_folder(folder, output, num_experts, samples), as_json)


def samples_of(folder: Path, text: list[Path]) -> Iterable[dict[str, Any]] | None:
    """What a model reads of these files, as keyword arguments of forward passes; None without files."""
    from peerlm.data.tokenizer import open_tokenizer
    from peerlm.evaluate.windows import batches_of, text_windows

    return batches_of(text_windows(open_tokenizer(folder), text, context=256)) if text else None


def _print_change(output: Path, row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(row)
    else:
        print_table(str(output), {"value": {**row, "layers": "\n".join(row["layers"])}})


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
    from peerlm.packs.files import read_manifest, read_tensors

    manifest = read_manifest(folder)
    read_tensors(folder, manifest)
    facts = asdict(manifest)
    if run is not None:
        from peerlm.evaluate import load_model

        load_model(run, [folder])
        facts["fits"] = str(run)
    if as_json:
        print_json(facts)
    else:
        print_table(str(folder), {"value": facts})
