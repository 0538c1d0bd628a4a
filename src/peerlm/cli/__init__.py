"""The command `peerlm`: each function parses, imports lazily, and calls.

A mistake that the user can fix is one line on stderr and exit code 2; a bug shows its traceback.
"""

import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import typer

from peerlm.cli.extras import offer_studies
from peerlm.cli.root import app
from peerlm.errors import PeerlmWarning, TrainingStopped, UserError, listed
from peerlm.files import is_disk_full
from peerlm.malloc import keep_freed_memory

# Each adds its commands to `app`; help lists them in this order.
from peerlm.cli import training, changing, learning, looking, serving, studies  # noqa: F401  isort: skip

offer_studies(app, studies.__name__)

_OVER_RANKS = ("train", "compare", "isoflop")
"""Commands that several processes of torchrun run together."""
_ALONE = ("--slurm", "--dry-run")
"""Options with which these train nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, by default the process's, and exit with its code.

    2 stands for a mistake of the user's, 130 for an interrupt; an exception's own `exit_code` is honoured.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a sample may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, between ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    keep_freed_memory()
    try:
        _require_utf8(arguments)
        _require_one_process(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app(arguments)
    except Exception as error:
        is_mistake = isinstance(error, UserError | OSError) or is_disk_full(error)
        exit_code = 2 if is_mistake else getattr(error, "exit_code", None)
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if alone:
            if exit_code is None:
                raise
            _say(error, arguments, is_mistake=is_mistake, alone=True)
            sys.exit(exit_code)
        from peerlm import ranks

        if exit_code is None:
            traceback.print_exc()
        elif ranks.is_first_to_fail():
            _say(error, arguments, is_mistake=is_mistake, alone=False)
        ranks.end_process(1 if exit_code is None else exit_code)


def _say(error: Exception, arguments: Sequence[str], *, is_mistake: bool, alone: bool) -> None:
    """Print why a command ended early, and what resumes it."""
    typer.echo(f"error: {_sentence(error)}" if is_mistake else str(error), err=True)
    if isinstance(error, TrainingStopped) and error.resumes:
        command = error.resume or _again(arguments)
        typer.echo(f"Resume with{'' if alone else ', started as before'}: {command}", err=True)


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *details: Any
) -> None:
    """Print our own warnings as one sentence; others as Python does."""
    if issubclass(category, PeerlmWarning):
        typer.echo(f"warning: {message}", err=True)
    else:
        otherwise(message, category, *details)


def _require_utf8(arguments: Sequence[str]) -> None:
    """Raise UserError where an argument's bytes are no UTF-8, which Python keeps as lone surrogates."""
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            readable = os.fsencode(argument).decode(errors="backslashreplace")
            raise UserError(
                f"argument {number}, {readable}, is not UTF-8: rename the file or write the text in UTF-8"
            ) from None


def _require_one_process(arguments: Sequence[str]) -> None:
    """Raise UserError where torchrun has started several processes of a command that each would run as a whole."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or not arguments:
        return
    name, given = arguments[0], {argument.partition("=")[0] for argument in arguments}
    alone = next((option for option in _ALONE if option in given), "")
    if name in _OVER_RANKS and not alone:
        return
    if int(os.environ.get("RANK", 0)) > 0:
        sys.exit(0)  # the first process says why; torchrun would end it before, were this one to fail
    command = typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]
    fix = ""
    if command is not None and any("--shard" in parameter.opts for parameter in command.params) and not alone:
        fix = f", and give each process a share of its rows, as in --shard 1/{count}"
    elif name == "learn":
        fix = "; methods and streams that are compared can run side by side, each with a GPU of its own"
    raise UserError(
        f"peerlm {' '.join(filter(None, (name, alone)))} does not run over the {count} processes that torchrun has "
        f"started, as {listed(_OVER_RANKS)} do: start it without torchrun{fix}"
    )


def _again(arguments: Sequence[str]) -> str:
    """The command that continues what was stopped, for a shell: the same, with --resume where it has that option."""
    command = typer.main.get_command(app).commands.get(arguments[0])  # type: ignore[attr-defined]
    resumes = command is not None and any("--resume" in parameter.opts for parameter in command.params)
    given = any(argument.partition("=")[0] == "--resume" for argument in arguments)
    return shlex.join(["peerlm", *arguments, *(["--resume"] if resumes and not given else [])])


def _sentence(error: Exception) -> str:
    """One line about an error, without the number that the system gives it."""
    if is_disk_full(error) and not isinstance(error, UserError):
        where = getattr(error, "filename", None)
        return f"the disk{f' of {where}' if where else ''} is full: free some space, then run this again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
