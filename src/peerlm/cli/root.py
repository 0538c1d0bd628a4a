"""The command itself, and the options that several of its commands have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from peerlm import __version__

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


def overrides(settings: Sequence[str], output: Path | None) -> list[str]:
    """The changes to a recipe; the folder is quoted as TOML quotes strings."""
    return [*settings, *([f"run={json.dumps(str(output))}"] if output else [])]
