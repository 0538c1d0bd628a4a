"""The options of `peerlm learn` as a configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlm.cli.conversion_options import read_settings
from peerlm.continual.config import LearnConfig
from peerlm.continual.stream import BACKGROUND
from peerlm.errors import UserError
from peerlm.train.recipe import from_dict

DEFAULT_BUDGET = {"tokens": 120_000}


def learn_config(
    *,
    text: Sequence[str],
    heldout: Sequence[str],
    settings: Sequence[str],
    budget: Mapping[str, Any],
    memory: Mapping[str, Any],
    **values: Any,
) -> LearnConfig:
    """The configuration of a stream.

    Args:
        text: FILE, or NAME=FILE, of each stage; a name that is not given is that of the file up to its first dot.
        heldout: NAME=FILE.
        settings: KEY=VALUE, of the method.
        budget: as `BudgetConfig`, None for what is not given.
        memory: as `RetentionConfig`.
        values: as `LearnConfig`.

    Raises:
        UserError: a value without sense, held-out text of a stage that there is not.
    """
    files = [_named(each) for each in text]
    measured = {}
    for each in heldout:
        name, equals, file = each.partition("=")
        if not equals or name not in [BACKGROUND, *(stage for stage, _ in files)]:
            names = ", ".join([*(stage for stage, _ in files), BACKGROUND])
            raise UserError(f"--heldout {each}: write NAME=FILE, with a NAME of {names}")
        measured[name] = file
    given = {name: value for name, value in budget.items() if value is not None}
    return from_dict(
        LearnConfig,
        {
            **values,
            "stages": [{"name": name, "text": [file], "heldout": measured.get(name)} for name, file in files],
            "settings": read_settings(settings),
            "budget": given or DEFAULT_BUDGET,
            "memory": {**memory, "heldout": measured.get(BACKGROUND)},
        },
    )


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    return (name, file) if equals else (Path(text).name.partition(".")[0], text)
