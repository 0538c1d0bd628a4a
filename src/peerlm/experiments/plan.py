"""A comparison's recipe, and the training runs that it stands for."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peerlm.errors import UserError
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import bound_values, from_dict, read_recipe, set_key


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Section [compare] of a recipe: what is trained beside each method, and what is measured afterwards."""

    seeds: tuple[int, ...] = (0,)
    """Every method is trained once with each of these."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Recipe keys and lists of values: every method is trained with every combination of them."""
    evaluate: tuple[str, ...] = ()
    """Files on which each trained model is evaluated, as by `peerlm eval`."""
    evaluate_limit: int | None = None
    """Tokens read of each file at the most; null: all."""
    jobs: int = 1
    """Runs that are made at a time, each with its share of the cores."""
    sample: str = "peer"
    """Method whose first model writes the sample of text."""
    prompt: str = "The"
    """What the sample goes on from."""
    sample_tokens: int = 120
    """Tokens the sample is long at the most."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"compare.jobs = {self.jobs}: must be at least 1")
        if not self.seeds:
            raise UserError("compare.seeds is empty: name at least one seed, for example [0]")
        for key, values in self.sweep.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"compare.sweep.{key} = {values!r}: give a list of the values to try")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run of a comparison."""

    method: str
    seed: int
    sweep: dict[str, Any]
    """The swept keys and this run's values."""
    train: TrainConfig

    @property
    def label(self) -> str:
        """The method, with the swept values: what a row of the table averages seeds over."""
        return " ".join([self.method, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.sweep.items())])

    def key(self, compare: CompareConfig) -> str:
        """Digest of all that the run's row depends on; a row with this key need not be made again."""
        values = bound_values(self.train) | {"eval": asdict(self.train.eval)}
        values |= {"files": compare.evaluate, "limit": compare.evaluate_limit}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class ComparePlan:
    """A comparison: its folder, its settings, its runs in the order in which they are made."""

    output: Path
    compare: CompareConfig
    runs: list[PlannedRun]


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> ComparePlan:
    """Read a comparison's recipe.

    It is a training recipe, which all runs share, with two sections more: [compare], see `CompareConfig`, and
    [methods.NAME] for each method, with the keys in which it differs from the shared recipe. `run` names the folder of
    the comparison.

    Raises:
        UserError: as `peerlm.train.load_recipe`, or the recipe names no method.
    """
    values = read_recipe(path, overrides)
    compare = from_dict(CompareConfig, _section(values, "compare"), prefix="compare.")
    methods = _section(values, "methods")
    if not methods:
        raise UserError(f"{path} compares nothing: add a section [methods.NAME] for each method")
    if not isinstance(values.get("run"), str):
        raise UserError(f"{path} lacks run: add the folder to write to, or give it with --output")
    output = Path(values["run"])
    runs = []
    for seed, name, point in itertools.product(compare.seeds, methods, _points(compare.sweep)):
        if not isinstance(methods[name], dict):
            raise UserError(f"methods.{name} = {methods[name]!r}: expected a section of keys")
        merged = _merge(values, methods[name])
        for key, value in point.items():
            set_key(merged, key, value)
        merged["seed"] = seed
        run = PlannedRun(method=name, seed=seed, sweep=point, train=from_dict(TrainConfig, merged | {"run": "-"}))
        folder = output / "runs" / f"{run.label} seed={seed}".replace(" ", "-").replace("/", "_")
        runs.append(
            PlannedRun(method=name, seed=seed, sweep=point, train=from_dict(TrainConfig, merged | {"run": str(folder)}))
        )
    return ComparePlan(output=output, compare=compare, runs=runs)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.pop(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{name} = {section!r}: expected a section of keys")
    return section


def _points(sweep: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
