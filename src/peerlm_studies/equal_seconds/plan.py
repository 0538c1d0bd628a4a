"""A recipe of equal seconds: methods, points in seconds, and the runs that they become at measured speeds."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peerlm.errors import UserError, listed
from peerlm.train.config import ParallelConfig, TablesConfig, TrainConfig
from peerlm.train.recipe import bound_values, from_dict, plain_values, read_recipe, without_keys
from peerlm_studies.comparison.plan import CompareConfig, PlannedRun, StudyPlan, comparison_of, take_section


@dataclass(frozen=True, kw_only=True)
class SecondsConfig:
    """Section [seconds] of a recipe: how long methods train."""

    points: tuple[float, ...]
    """Seconds of training; every method is trained once for each, with a schedule of its own."""
    only: dict[str, Any] = field(default_factory=dict)
    """By method, the points for which it is trained in place of all: a size that is best for few seconds alone."""
    warm_up: int = 5
    """Steps before those that are timed: memory is new in them."""
    rounds: int = 20
    """Steps that are timed, of which the median counts."""
    passes: int = 1
    """Times that all methods are timed, one after the other, so that slow minutes meet all; the median counts."""

    def __post_init__(self) -> None:
        if not self.points or min(self.points) <= 0:
            raise UserError(f"seconds.points = {list(self.points)}: name at least one number above 0")
        for name in ("warm_up", "rounds", "passes"):
            if getattr(self, name) < 1:
                raise UserError(f"seconds.{name} = {getattr(self, name)}: at least 1")
        for method, points in self.only.items():
            if not isinstance(points, list) or not all(point in self.points for point in points):
                raise UserError(f"seconds.only.{method} = {points!r}: give a list of some of {list(self.points)}")

    def points_of(self, method: str) -> list[float]:
        """The points for which this method is trained."""
        return [float(point) for point in self.only.get(method, self.points)]


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """One training run, and the seconds that it stands for."""

    method: str
    seconds: float
    planned: PlannedRun


@dataclass(frozen=True, kw_only=True)
class SecondsPlan(StudyPlan):
    """A study of equal seconds."""

    seconds: SecondsConfig

    def timed(self, method: str) -> TrainConfig:
        """What the speed of a method is measured on: its run of as many steps."""
        steps = self.seconds.warm_up + self.seconds.rounds
        return self.recipe.run(method, seed=self.compare.seeds[0], sweep={}, changes={"budget.steps": steps}).train

    def speed_key(self, method: str, threads: int) -> str:
        """Digest of all that a method's speed depends on but the machine; see `speed_key`."""
        return speed_key(self.timed(method), threads, self.seconds)

    def speeds(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """By method, the row of speeds that is its own; methods without one are left out.

        Of rows of several numbers of threads those of one count that all these methods have, the largest.

        Raises:
            UserError: no number of threads has the speeds of all methods that have one.
        """
        by_key = {row["key"]: row for row in rows}
        found: dict[int, dict[str, Mapping[str, Any]]] = {}
        for threads in sorted({row["threads"] for row in by_key.values()}):
            keys = {method: self.speed_key(method, threads) for method in self.recipe.methods}
            if own := {method: by_key[key] for method, key in keys.items() if key in by_key}:
                found[threads] = own
        measured = {method for own in found.values() for method in own}
        for threads in reversed(found):
            if found[threads].keys() == measured:
                return found[threads]
        if found:
            raise UserError(f"speeds were measured with {[*found]} threads: keep the rows of one number")
        return {}

    def runs(self, seconds_per_step: Mapping[str, float]) -> list[TimedRun]:
        """The runs at these speeds, those of few seconds first; seeds within. Methods without a speed have none.

        Raises:
            UserError: a point has no room for a single step of a method.
        """
        runs = []
        for point in sorted(self.seconds.points):
            for seed in self.compare.seeds:
                for method in self.recipe.methods:
                    if method not in seconds_per_step or point not in self.seconds.points_of(method):
                        continue
                    steps = int(point / seconds_per_step[method])
                    if not steps:
                        raise UserError(
                            f"seconds.points has {point:g}, and one step of {method} takes "
                            f"{seconds_per_step[method]:.3g} s: raise it, or lower data.batch_size"
                        )
                    planned = self.recipe.run(
                        method, seed=seed, sweep={"seconds": f"{point:g}"}, changes={"budget.steps": steps}
                    )
                    # A speed that is measured again makes another run, which has a folder of its own.
                    train = replace(planned.train, run=f"{planned.train.run}-steps={steps}")
                    runs.append(TimedRun(method=method, seconds=point, planned=replace(planned, train=train)))
        return runs


_DEFAULTS: dict[str, Any] = {"tables": TablesConfig(), "parallel": ParallelConfig(), "graph": "auto"}
"""Settings that a step's time depends on, though no weight does, where they are as in old rows."""


_TIMELESS = (
    "model.ffw_init_scale",
    "model.kv_shift_init",
    "optim.decay",
    "optim.final",
    "optim.keys_lr_multiplier",
    "optim.learning_rate",
    "optim.schedule",
    "optim.table_lr_decay",
    "optim.table_lr_multiplier",
    "optim.table_warmup",
    "optim.warmup",
)
"""Settings that weights depend on and no step's time: where weights start, and how far a step moves them."""


def speed_key(timed: TrainConfig, threads: int, seconds: SecondsConfig) -> str:
    """Digest of all that the speed of a run depends on but the machine; see `SecondsPlan.timed`.

    Methods that differ in their rates alone, or in where weights start, have one: they compute the same products.
    """
    values = {**without_keys(bound_values(timed), _TIMELESS), "threads": threads, "rounds": seconds.rounds}
    own, plain = plain_values(timed), plain_values(replace(timed, **_DEFAULTS))
    values |= {name: own.get(name) for name in _DEFAULTS if own.get(name) != plain.get(name)}
    if seconds.passes > 1:  # rows of a single pass keep their keys
        values["passes"] = seconds.passes
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_seconds(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> SecondsPlan:
    """Read a recipe of equal seconds: a comparison's (see `load_plan`) with [seconds] in the place of [budget].

    Raises:
        UserError: as `load_plan`, or [seconds] is wrong or not there, or the recipe has what it replaces, or grows.
    """
    values = read_recipe(path, overrides)
    seconds = take_section(values, "seconds")
    if not seconds:
        raise UserError(f"{path} is no recipe of equal seconds: add a section [seconds] with points")
    if take_section(values, "budget"):
        raise UserError(f"{path} sets a budget beside seconds.points: leave [budget] out")
    recipe = comparison_of(values, path)
    if recipe.compare.sweep:
        raise UserError(f"{path} has compare.sweep beside seconds.points: write each setting as a method")
    study = from_dict(SecondsConfig, seconds, prefix="seconds.")
    for method in study.only:
        if method not in recipe.methods:
            raise UserError(f"seconds.only names {method!r}: choose from {listed(recipe.methods)}")
    plan = SecondsPlan(seconds=study, recipe=replace(recipe, shared=recipe.shared | {"budget": {}}))
    for method in recipe.methods:
        if at := plan.timed(method).grow.at:
            raise UserError(
                f"{method} has grow.at = {at!r}, and its speed, which is measured once, changes: leave it out"
            )
    return plan


def runs_at_speeds(
    path: str | Path, speeds: Iterable[Mapping[str, Any]], overrides: tuple[str, ...] | list[str] = ()
) -> tuple[CompareConfig, list[PlannedRun]]:
    """What is measured of each run, and the runs, of a recipe of equal seconds at the rows of its speeds.

    Raises:
        UserError: as `load_seconds`.
    """
    plan = load_seconds(path, overrides)
    found = plan.speeds(speeds)
    runs = plan.runs({method: row["seconds_per_step"] for method, row in found.items()})
    return plan.compare, [run.planned for run in runs]
