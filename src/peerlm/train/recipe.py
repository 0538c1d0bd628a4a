"""Recipes: a TOML file, changed by `key=value`, becomes a TrainConfig; every mistake is named."""

import dataclasses
import functools
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from peerlm.data.manifest import MANIFEST_FILE
from peerlm.errors import UserError, shortened
from peerlm.train.config import UNBOUND_KEYS, TrainConfig
from peerlm.train.presets import with_preset
from peerlm.train.starter import starter_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigT = TypeVar("ConfigT")


@functools.cache
def _type_hints(config_class: Any) -> dict[str, Any]:
    """A study reads hundreds of configurations of the same few classes."""
    return get_type_hints(config_class)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe (TOML), or the resolved config.json of a run or in its folder, and change it by `overrides`.

    A folder that `peerlm prepare` wrote stands for a recipe too, of a small model (see `starter_recipe`).
    An override is `section.key=value`; they apply in order. A value is written as in TOML; a bare word
    counts as a string, and null unsets a key. Overriding a key of [budget] replaces the recipe's budget.
    Raises UserError for a file that cannot be read, an unknown key (naming the nearest known one), or a value of the
    wrong type or out of range.
    """
    return from_dict(TrainConfig, read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested plain values of a recipe with overrides, on its preset; keys and types are not checked yet."""
    values = _read(Path(path))
    if any(override.startswith("budget.") for override in overrides):
        values.pop("budget", None)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UserError(f"cannot read the setting {override!r}: write it as section.key=value")
        set_key(values, key.strip(), _toml_value(text.strip()))
    return with_preset(values)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in nested plain values, in place; one key of [budget] replaces the whole budget."""
    path = key.split(".")
    for depth, section in enumerate(path[:-1]):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"cannot set {key}: {'.'.join(path[: depth + 1])} is {values!r}, not a section")
    values[path[-1]] = value


def from_dict(config_class: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Build a dataclass of configuration from nested plain values, checking every key and type.

    Integers pass for floats, lists for tuples, and nothing else for anything else. `prefix` goes before the
    keys in messages.
    """
    hints = _type_hints(config_class)  # type: ignore[arg-type]  # classes are hashable
    fields = {entry.name: entry for entry in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(prefix + key, _all_keys(config_class, prefix))
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"the recipe lacks {prefix + name}: add it, or give it with --set {prefix + name}=...")
    return config_class(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested plain values; `from_dict` gives the same configuration back."""
    return dataclasses.asdict(config)


def unknown_key(key: str, known: Sequence[str]) -> UserError:
    """The error for a key that does not exist, naming the nearest of `known`, be it in another section."""

    def likeness(other: str) -> float:
        names = (key.rpartition(".")[2], other.rpartition(".")[2])
        return SequenceMatcher(None, key, other).ratio() + SequenceMatcher(None, *names).ratio()

    return UserError(f"unknown key {key!r}: did you mean {max(known, key=likeness)!r}?")


def plain_values(config: Any) -> Any:
    """A configuration as nested plain values without `config.added` ones at their defaults: what a row is known by."""
    if isinstance(config, list | tuple):
        return [plain_values(part) for part in config]
    if not dataclasses.is_dataclass(config):
        return config
    return {
        entry.name: plain_values(value)
        for entry in dataclasses.fields(config)
        for value in [getattr(config, entry.name)]
        if not entry.metadata.get("added") or value != entry.default
    }


def bound_values(config: TrainConfig) -> dict[str, Any]:
    """The values that the weights depend on, by full key: all but `config.UNBOUND_KEYS`, and [grow] if none does."""
    return without_keys(_flatten(plain_values(config)), UNBOUND_KEYS if config.grow.at else (*UNBOUND_KEYS, "grow"))


def without_keys(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Values by full key, but for keys of these names and those below them."""
    names = tuple(names)
    return {
        key: value
        for key, value in values.items()
        if not any(key == name or key.startswith(name + ".") for name in names)
    }


def first_difference(old: TrainConfig, new: TrainConfig) -> str | None:
    """Say where two configurations differ in a key that the weights depend on; None when they do not."""
    flat_old, flat_new = bound_values(old), bound_values(new)
    for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]:
        before, after = (repr(flat[key]) if key in flat else "unset" for flat in (flat_old, flat_new))
        if before != after:
            return f"{key} was {shortened(before)}, now {shortened(after)}"
    return None


def _read(path: Path) -> dict[str, Any]:
    if (path / MANIFEST_FILE).is_file():
        return starter_recipe(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no run and no prepared folder: name one of these, or a recipe")
        path = path / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}; name a TOML file or a run's config.json") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not the sections of a recipe")
    return values


def _toml_value(text: str) -> Any:
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(value: Any, expected: Any, key: str) -> Any:
    origin, arguments = get_origin(expected), get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if isinstance(value, dict):
            return from_dict(expected, value, prefix=f"{key}.")
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin in (types.UnionType, Union):
        if value is None:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not types.NoneType), key)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(part, arguments[0], f"{key}[{index}]") for index, part in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif expected is float and type(value) in (int, float):
        return float(value)
    elif type(value) is expected:
        return value
    raise UserError(f"{key} = {value!r}: expected {_name(expected)}")


def _all_keys(config_class: Any, prefix: str) -> list[str]:
    keys = []
    for name, hint in _type_hints(config_class).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(hint, f"{prefix}{name}.")
    return keys


def _name(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(expected))
    if get_origin(expected) is tuple:
        return f"a list, each part {_name(get_args(expected)[0])}"
    if dataclasses.is_dataclass(expected) or get_origin(expected) is dict:
        return "a section of keys"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[expected]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
