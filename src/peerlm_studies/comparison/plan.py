"""A comparison's recipe, and its training runs."""

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peerlm.errors import UserError, listed
from peerlm.train.config import TrainConfig
from peerlm.train.presets import merge, with_preset
from peerlm.train.recipe import bound_values, from_dict, plain_values, read_recipe, set_key


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Section [compare] of a recipe: what is trained beside each method, and what is measured afterwards."""

    seeds: tuple[int, ...] = (0,)
    """Every method is trained once with each of these."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Recipe keys and lists of values: every method is trained with every combination of them."""
    only: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By method and swept key, the values with which that method is trained in place of all."""
    evaluate: tuple[str, ...] = ()
    """Files on which each trained model is evaluated, as by `peerlm eval`."""
    evaluate_limit: int | None = None
    """Tokens read of each file at the most; null: all."""
    jobs: int = 1
    """Runs that are made at a time, each with its share of the cores."""
    keep: Literal["checkpoints", "model", "rows"] = "checkpoints"
    """What stays of a run once it has its row: all, its model without checkpoints, or neither. Logs stay, and the
    model that writes the sample."""
    sample: str = "peer"
    """Method whose first model writes the sample of text."""
    prompt: str = "The"
    """The prompt of the sample."""
    sample_tokens: int = 120
    """Tokens the sample is long at the most."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"compare.jobs = {self.jobs}: must be at least 1")
        if not self.seeds:
            raise UserError("compare.seeds is empty: name at least one seed, for example [0]")
        names = [Path(file).stem for file in self.evaluate]
        for name in names:
            if names.count(name) > 1 or name == "validation":  # the name of the held-out split in tables
                raise UserError(
                    f"compare.evaluate = {list(self.evaluate)}: tables call a file by its name without the ending, and "
                    f"{name!r} is taken; rename or copy one"
                )
        for key, values in self.sweep.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"compare.sweep.{key} = {values!r}: give a list of the values to try")
        for method, keys in self.only.items():
            for key, values in keys.items():
                if key not in self.sweep:
                    raise UserError(f"compare.only.{method}.{key} is not swept: choose from {listed(self.sweep)}")
                if not isinstance(values, list) or not all(value in self.sweep[key] for value in values):
                    raise UserError(
                        f"compare.only.{method}.{key} = {values!r}: give a list of some of {self.sweep[key]}"
                    )

    def points(self, method: str) -> list[dict[str, Any]]:
        """The combinations of swept keys and values with which a method is trained."""
        sweep = self.sweep | self.only.get(method, {})
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


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
        values = bound_values(self.train) | {"eval": plain_values(self.train.eval)}
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
        UserError: as `peerlm.train.load_recipe`, or the recipe names no method, or two whose rows would be one.
    """
    recipe = read_comparison(path, overrides)
    runs = [
        recipe.run(name, seed=seed, sweep=point)
        for seed, name in itertools.product(recipe.compare.seeds, recipe.methods)
        for point in recipe.compare.points(name)
    ]
    check_told_apart(runs, recipe.compare)
    return ComparePlan(output=recipe.output, compare=recipe.compare, runs=runs)


def check_told_apart(runs: Sequence[PlannedRun], compare: CompareConfig) -> None:
    """Raise UserError where two runs differ in nothing that weights or figures depend on, so that one row is both's."""
    labels: dict[str, str] = {}
    for run in runs:
        label = f"{run.label}, seed {run.seed}"
        if (other := labels.setdefault(run.key(compare), label)) != label:
            raise UserError(
                f"{other!r} and {label!r} are one run: they differ in nothing that the weights depend on (where tables "
                "are, graphs and processes are nothing of the kind); leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class ComparisonRecipe:
    """A comparison's recipe as it was read, from which runs are made."""

    output: Path
    compare: CompareConfig
    methods: dict[str, dict[str, Any]]
    """The keys in which each method differs from what is shared."""
    shared: dict[str, Any]
    """The training recipe that all runs share; its keys are checked when a run is made."""

    def run(
        self, method: str, *, seed: int, sweep: Mapping[str, Any], changes: Mapping[str, Any] | None = None
    ) -> PlannedRun:
        """The run of a method with a seed and these changes of `section.key`.

        Args:
            method: a name in `methods`.
            seed: of the run.
            sweep: what tells the run from others of its method; it is in its label.
            changes: keys and values; `sweep` if None.

        Raises:
            UserError: the run's configuration is none, or names a seed itself.
        """
        merged = copy.deepcopy(merge(self.shared, with_preset(self.methods[method], f"methods.{method}.")))
        for key, value in (sweep if changes is None else changes).items():
            set_key(merged, key, value)
        if "seed" in merged:
            raise UserError(
                f"the recipe has seed = {merged['seed']!r}, and seeds of a study are compare.seeds: leave seed out, or "
                f"set compare.seeds = [{merged['seed']!r}]"
            )
        merged["seed"] = seed
        run = PlannedRun(
            method=method, seed=seed, sweep=dict(sweep), train=from_dict(TrainConfig, merged | {"run": "-"})
        )
        folder = self.output / "runs" / f"{run.label} seed={seed}".replace(" ", "-").replace("/", "_")
        return replace(run, train=replace(run.train, run=str(folder)))


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A study whose runs are made from a comparison's recipe."""

    recipe: ComparisonRecipe

    @property
    def output(self) -> Path:
        """The folder of the study."""
        return self.recipe.output

    @property
    def compare(self) -> CompareConfig:
        """What is measured of each run."""
        return self.recipe.compare


def read_comparison(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonRecipe:
    """Read what `load_plan` reads, as the recipe from which runs are made; raises UserError as it does."""
    return comparison_of(read_recipe(path, overrides), path)


def comparison_of(values: dict[str, Any], path: str | Path) -> ComparisonRecipe:
    """The comparison in a recipe's values, which are used up; `path` is for messages."""
    compare = from_dict(CompareConfig, take_section(values, "compare"), prefix="compare.")
    methods = take_section(values, "methods")
    if not methods:
        raise UserError(f"{path} compares nothing: add a section [methods.NAME] for each method")
    if not isinstance(values.get("run"), str):
        raise UserError(f"{path} lacks run: add the folder to write to, or give it with --output")
    for name, keys in methods.items():
        if not isinstance(keys, dict):
            raise UserError(f"methods.{name} = {keys!r}: expected a section of keys")
    for name in compare.only:
        if name not in methods:
            raise UserError(f"compare.only names {name!r}: choose from {listed(methods)}")
    return ComparisonRecipe(output=Path(values["run"]), compare=compare, methods=methods, shared=values)


def take_section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Take a section out of nested plain values; empty where there is none."""
    section = values.pop(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{name} = {section!r}: expected a section of keys")
    return section
