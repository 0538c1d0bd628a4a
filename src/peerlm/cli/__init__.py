"""The command `peerlm`: each function parses, imports lazily, and calls.

A mistake that the user can mend is one line on stderr and exit code 2; a bug shows its traceback.
"""

import os
import sys
from collections.abc import Sequence

import typer

from peerlm.cli.extras import offer_studies
from peerlm.cli.root import app
from peerlm.errors import UserError
from peerlm.malloc import keep_freed_memory

# Each adds its commands to `app`; help lists them in this order.
from peerlm.cli import training, changing, learning, looking, studies  # noqa: F401  isort: skip

offer_studies(app, studies.__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, by default the process's, and exit with its code.

    2 stands for a mistake of the user's, 130 for an interrupt; an exception's own `exit_code` is honoured.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, between ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    keep_freed_memory()
    try:
        app(arguments)
    except Exception as error:
        is_mistake = isinstance(error, UserError | OSError)
        exit_code = 2 if is_mistake else getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        typer.echo(f"error: {_sentence(error)}" if is_mistake else str(error), err=True)
        sys.exit(exit_code)


def _sentence(error: Exception) -> str:
    """One line about an error, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
