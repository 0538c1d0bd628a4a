"""Studies that are modules and no commands of `peerlm`: a user's mistake is one sentence there too."""

import sys
from collections.abc import Callable

import typer

from peerlm.errors import UserError
from peerlm.malloc import keep_freed_memory


def run_script(main: Callable[..., object]) -> None:
    """Run a function as the command of a module, `python -m`; exits with 2 after a mistake of the user's."""
    keep_freed_memory()
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
