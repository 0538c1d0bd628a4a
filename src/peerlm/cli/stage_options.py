"""The options of `peerlm learn` as a configuration."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlm.cli.conversion_options import read_settings
from peerlm.continual.config import LearnConfig
from peerlm.continual.stream import BACKGROUND
from peerlm.errors import UserError, listed
from peerlm.train.recipe import from_dict


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
        text: FILE, or NAME=FILE, of each stage; a name that is not given is that of the file up to its first dot. A
            path that exists, or has a slash before its first "=", is a FILE.
        heldout: NAME=FILE.
        settings: KEY=VALUE, of the method.
        budget: as `BudgetConfig`, None for what is not given.
        memory: as `RetentionConfig`.
        values: as `LearnConfig`.

    Raises:
        UserError: a value without sense, held-out text of a stage that there is not, a text that is an existing path
            both with and without its NAME=.
    """
    files = [_named(each) for each in text]
    measured = {}
    names = [*(stage for stage, _ in files), BACKGROUND]
    for each in heldout:
        name = max((name for name in names if each.startswith(f"{name}=")), key=len, default=None)
        if name is None:
            raise UserError(f"--heldout {each}: write NAME=FILE, with a NAME of {listed(names)}")
        measured[name] = each.removeprefix(f"{name}=")
    given = {name: value for name, value in budget.items() if value is not None}
    return from_dict(
        LearnConfig,
        {
            **values,
            "stages": [{"name": name, "text": [file], "heldout": measured.get(name)} for name, file in files],
            "settings": read_settings(settings),
            **({"budget": given} if given else {}),
            "memory": {**memory, "heldout": measured.get(BACKGROUND)},
        },
    )


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if equals and not any(separator in name for separator in ("/", os.sep)):
        if not Path(text).exists():
            return name, file
        if file and Path(file).exists():
            raise UserError(f"--text {text} is a path, and so is {file}: write ./{text}, or {name}=./{file}")
    return Path(text).name.partition(".")[0], text
