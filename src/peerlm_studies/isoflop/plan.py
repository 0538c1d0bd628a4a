"""An isoFLOP recipe: methods, sizes and budgets, and their training runs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peerlm.errors import UserError, listed
from peerlm.train.recipe import from_dict, read_recipe
from peerlm_studies.comparison.plan import (
    CompareConfig,
    PlannedRun,
    StudyPlan,
    check_told_apart,
    comparison_of,
    load_plan,
    take_section,
)


@dataclass(frozen=True, kw_only=True)
class IsoflopConfig:
    """Section [isoflop] of a recipe: which sizes of a model are trained at which budgets."""

    sizes: dict[str, Any]
    """Names of sizes, and the recipe keys, with values, that make each."""
    budgets: dict[str, Any]
    """Training FLOPs, written as a number in quotes, and the names of the sizes that are trained with them."""
    optimum_seeds: tuple[int, ...] = ()
    """More seeds, with which the size next to a curve's optimum is trained."""
    only: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By method and budget, the names of the sizes that are trained in place of all of that budget."""

    def __post_init__(self) -> None:
        for name, keys in self.sizes.items():
            if not isinstance(keys, dict) or not keys:
                raise UserError(f'isoflop.sizes.{name} = {keys!r}: write {{ "model.hidden_size" = 128 }}, for example')
        for budget, names in self.budgets.items():
            flops_of(budget)
            if not isinstance(names, list) or not names:
                raise UserError(f"isoflop.budgets.{budget} = {names!r}: give a list of names of sizes")
            self._check_sizes(f"isoflop.budgets.{budget}", names, self.sizes, "add it to [isoflop.sizes]")
        if not self.budgets:
            raise UserError('isoflop.budgets is empty: name at least one, for example "2e12" = ["small", "large"]')
        for method, of_budget in self.only.items():
            for budget, names in of_budget.items():
                where = f"isoflop.only.{method}.{budget}"
                if budget not in self.budgets:
                    raise UserError(f"{where} names no budget: choose from {listed(self.budgets)}")
                if not isinstance(names, list):
                    raise UserError(f"{where} = {names!r}: give a list of names of sizes")
                self._check_sizes(where, names, self.budgets[budget], f"add it to isoflop.budgets.{budget}")

    @staticmethod
    def _check_sizes(where: str, names: Sequence[str], known: Collection[str], otherwise: str) -> None:
        for name in names:
            if name not in known:
                raise UserError(f"{where} names {name!r}: choose from {listed(known)}, or {otherwise}")

    def sizes_of(self, method: str, budget: str) -> list[str]:
        """The names of the sizes of this method that are trained with this budget."""
        sizes: list[str] = self.only.get(method, {}).get(budget, self.budgets[budget])
        return sizes


def flops_of(budget: str) -> float:
    """The FLOPs that a budget's name says; raises UserError where it is no positive number."""
    try:
        flops = float(budget)
    except ValueError:
        flops = 0.0
    if not 0 < flops < float("inf"):
        raise UserError(f"isoflop.budgets has {budget!r}: name a number of FLOPs, for example 2e12")
    return flops


@dataclass(frozen=True, kw_only=True)
class IsoflopRun:
    """One training run, and where on the curves it lies."""

    method: str
    flops: float
    size: str
    planned: PlannedRun


@dataclass(frozen=True, kw_only=True)
class IsoflopPlan(StudyPlan):
    """An isoFLOP study: its folder, its settings, and its runs."""

    isoflop: IsoflopConfig

    @property
    def all_seeds(self) -> list[int]:
        """Those of every run, then those of the optimum."""
        return list(dict.fromkeys([*self.compare.seeds, *self.isoflop.optimum_seeds]))

    def runs(
        self,
        seeds: Sequence[int] | None = None,
        *,
        methods: Sequence[str] = (),
        budgets: Sequence[str] = (),
        sizes: Sequence[str] = (),
        whole: bool = False,
    ) -> list[IsoflopRun]:
        """The runs with these seeds, by default those of every run, smallest budgets first.

        Args:
            seeds: of the runs.
            methods, budgets, sizes: only these; empty: all.
            whole: whether those that `isoflop.only` leaves out are among them.

        Raises:
            UserError: a method, budget or size that the recipe lacks, or a run's configuration is none.
        """
        names = {"method": self.recipe.methods, "budget": self.isoflop.budgets, "size": self.isoflop.sizes}
        for (what, known), chosen in zip(names.items(), (methods, budgets, sizes), strict=True):
            for name in chosen:
                if name not in known:
                    raise UserError(f"there is no {what} {name!r}: choose from {listed(known)}")
        return [
            self._run(method, budget, size, seed)
            for budget in sorted(self.isoflop.budgets, key=flops_of)
            if not budgets or budget in budgets
            for seed in (self.compare.seeds if seeds is None else seeds)
            for method in self.recipe.methods
            if not methods or method in methods
            for size in (self.isoflop.budgets[budget] if whole else self.isoflop.sizes_of(method, budget))
            if not sizes or size in sizes
        ]

    def _run(self, method: str, budget: str, size: str, seed: int) -> IsoflopRun:
        flops = flops_of(budget)
        planned = self.recipe.run(
            method,
            seed=seed,
            sweep={"flops": budget, "size": size},
            changes={"budget.flops": flops, **self.isoflop.sizes[size]},
        )
        return IsoflopRun(method=method, flops=flops, size=size, planned=planned)


def load_isoflop(path: str | Path, overrides: Sequence[str] = ()) -> IsoflopPlan:
    """Read an isoFLOP recipe.

    It is a comparison's (see `load_plan`) with the section [isoflop], see `IsoflopConfig`, in the place of [budget] and
    of compare.sweep. A run has the configuration, and so the key, that a comparison would give it.

    Raises:
        UserError: as `load_plan`, or [isoflop] is wrong, or the recipe has what it replaces.
    """
    values = read_recipe(path, overrides)
    isoflop = take_section(values, "isoflop")
    if not isoflop:
        raise UserError(f"{path} is no isoFLOP recipe: add a section [isoflop] with sizes and budgets")
    if take_section(values, "budget"):
        raise UserError(f"{path} sets a budget beside isoflop.budgets: leave [budget] out")
    recipe = comparison_of(values, path)
    if recipe.compare.sweep:
        raise UserError(f"{path} has compare.sweep beside isoflop.sizes: leave it out")
    study = from_dict(IsoflopConfig, isoflop, prefix="isoflop.")
    for method in study.only:
        if method not in recipe.methods:
            raise UserError(f"isoflop.only names {method!r}: choose from {listed(recipe.methods)}")
    recipe = replace(recipe, shared=recipe.shared | {"budget": {}})
    plan = IsoflopPlan(isoflop=study, recipe=recipe)
    check_told_apart([run.planned for run in plan.runs(plan.compare.seeds[:1])], plan.compare)
    return plan


def runs_of_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[CompareConfig, list[PlannedRun]]:
    """What is measured of each run, and the runs, of a comparison's recipe or of one with [isoflop].

    Raises:
        UserError: as `load_plan` or `load_isoflop`.
    """
    if "isoflop" in read_recipe(path, overrides):
        study = load_isoflop(path, overrides)
        return study.compare, [run.planned for run in study.runs(study.all_seeds)]
    comparison = load_plan(path, overrides)
    return comparison.compare, comparison.runs
