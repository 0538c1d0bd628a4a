"""Commands of an extra that is not installed: hidden from the help, and one line on what to install."""

import importlib.util
from collections.abc import Callable

import typer

from peerlm.errors import UserError

SERVE_NEEDS = ("fastapi", "openai", "prometheus_client", "uvicorn")
"""What the extra `serve` installs, by import name."""
STUDIES_NEED = ("markdown_it", "matplotlib", "scipy")
"""What the extra `studies` installs, by import name."""


def missing_for_studies() -> list[str]:
    """The packages that studies need and this environment lacks."""
    return [name for name in STUDIES_NEED if importlib.util.find_spec(name) is None]


def require_serve() -> None:
    """Raise UserError where packages of the extra `serve` are missing."""
    missing = [name for name in SERVE_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'`peerlm serve` needs {", ".join(missing)}: pip install "peerlm[serve]"')


def offer_studies(app: typer.Typer, module: str) -> None:
    """Where packages are missing, let each command that `module` has added to `app` say so in place of running."""
    missing = missing_for_studies()
    if missing:
        for command in app.registered_commands:
            if command.callback is not None and command.callback.__module__ == module:
                command.name = command.name or command.callback.__name__
                command.hidden = True
                command.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}
                command.callback = _refusal(command.name, missing)


def _refusal(name: str, missing: list[str]) -> Callable[[], None]:
    def refuse() -> None:
        raise UserError(f'`peerlm {name}` is a study and needs {", ".join(missing)}: pip install "peerlm[studies]"')

    return refuse
