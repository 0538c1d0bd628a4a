"""The command itself, and the options that several of its commands have."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from peerlm import __version__
from peerlm.cli.show import check_file
from peerlm.errors import UserError


def _with_plain_types(parameters: list[Any]) -> list[Any]:
    """Parameters that help shows without the types that mean something in Python alone: of flags, and of lists."""
    for parameter in parameters:
        kind = parameter.type_descriptor.annotation
        if getattr(parameter, "is_bool_flag", False):
            parameter.metavar = ""
        elif get_origin(kind) is list:
            parameter.display_type = partial(_element_type, get_args(kind)[0].__name__)
    return parameters


def _element_type(name: str, ctx: object) -> str:
    return f"<{name.lower()}>"


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `--resume` alone, which takes no next argument, as `--resume=yes`."""
        return super().parse_args(ctx, ["--resume=yes" if argument == "--resume" else argument for argument in args])

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))


class Commands(typer.Typer):
    """A group of commands whose help has plain types, and examples in lines of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, **options)

    def command(self, name: str | None = None, *, examples: Sequence[str] = (), **options: Any) -> Callable[..., Any]:
        """As of typer, with commands to show at the end of the help."""
        title = "Example:" if len(examples) == 1 else "Examples:"
        return super().command(name, cls=_Command, epilog="\n\n".join([title, *examples]), **options)


app = Commands(
    epilog="Example: peerlm train recipes/train-demo.toml --output runs/a",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peerlm {__version__}")
        raise typer.Exit


Recipe = Annotated[Path, typer.Argument(help="TOML file, or a run or its config.json.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
]
Output = Annotated[Path | None, typer.Option(help="Folder to write; the same as --set run=FOLDER.")]
Run = Annotated[Path, typer.Argument(help="Run folder, or folder of a saved model.")]
DocumentStart = Annotated[
    str,
    typer.Option(metavar="auto|none|TOKEN", help="What stands before each document; auto: as tokenizer and model say."),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_file,
        help="Write the figures to FILE as JSON too; - prints them in place of tables and progress.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="[=auto]",
        help="Continue from the newest checkpoint; =auto: where there is nothing to resume, start.",
    ),
]
PackFolders = Annotated[
    list[Path], typer.Option("--pack", metavar="FOLDER", help="A pack to load into the model first; repeatable.")
]
DeviceRows = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Rows of each table that the GPU has places for; all rows stay on the host. 0: tables are moved whole.",
    ),
]
Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def options(version: Version = False) -> None:
    """Train language models of a million single-neuron experts (PEER), and compare them with baselines."""


def read_resume(given: str | None) -> 'bool | Literal["auto"]':
    """What `--resume`, `--resume=auto`, or neither asks for; raises UserError for another value."""
    if given not in (None, "yes", "auto"):
        raise UserError(f"--resume={given} is unknown: write --resume, or --resume=auto")
    return "auto" if given == "auto" else given is not None


def overrides(settings: Sequence[str], output: Path | None) -> list[str]:
    """The changes to a recipe; the folder is quoted as TOML quotes strings."""
    return [*settings, *([f"run={json.dumps(str(output))}"] if output else [])]
