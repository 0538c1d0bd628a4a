"""What the command line says of a conversion, as plain values."""

import json
from collections.abc import Sequence
from typing import Any

from peerlm.errors import UserError


def read_layers(text: str) -> str | list[int] | None:
    """Which layers, as `convert` takes them, of "all", "middle", or numbers with commas between.

    Raises:
        UserError: it is something else.
    """
    if text in ("all", "middle"):
        return None if text == "all" else text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"--layers is {text!r}; write all, middle, or numbers as in 0,3,-1") from error


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from `key=value`: values are written as in JSON, a bare word counts as a string.

    Raises:
        UserError: one is not of this form.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise UserError(f"cannot read the setting {setting!r}: write it as key=value")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
