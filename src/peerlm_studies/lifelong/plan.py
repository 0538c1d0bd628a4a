"""The recipe of `peerlm lifelong`, and its streams."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peerlm.continual import LearnConfig
from peerlm.continual.methods import method_of
from peerlm.errors import UserError, listed
from peerlm.marks import AUTO
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import bound_values, from_dict, plain_values, read_recipe


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """Section [lifelong.domains.NAME]."""

    text: tuple[str, ...]
    """Files to learn from."""
    heldout: str
    """File that the perplexity is measured on."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Section [methods.NAME]: how one method differs from [learn]."""

    method: str
    """A name in `peerlm.continual.methods`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the method."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Of `RetentionConfig`."""
    optim: dict[str, Any] = field(default_factory=dict)
    """Of `OptimConfig`."""
    once: bool = False
    """Whether the first seed and order suffice."""


@dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """Section [facts]: facts of some countries are learned by a model that never saw them."""

    countries: int = 40
    """Whose articles are left out of the base's text, and learned later."""
    methods: tuple[str, ...] = ()
    """Which; empty: all."""
    prose: str | None = None
    """File that shows what is forgotten."""
    lambada: str | None = None
    """As `prose`, passages with a last word."""
    lambada_limit: int = 20_000
    """Tokens of it that are read."""
    budget: dict[str, Any] = field(default_factory=dict)
    """In place of [learn]'s."""


@dataclass(frozen=True, kw_only=True)
class LifelongConfig:
    """Section [lifelong]."""

    domains: dict[str, Any]
    """Domains by name; see `DomainConfig`."""
    base: str
    """Domain that the base model is trained on."""
    orders: tuple[tuple[str, ...], ...]
    """Orders in which the others are learned."""
    seeds: tuple[int, ...] = (0,)
    """Of base models, orders of text and new weights."""
    full: str = "full"
    """Method that others' forgetting is compared with."""


@dataclass(frozen=True, kw_only=True)
class PlannedStream:
    """One method, order and seed."""

    label: str
    order: tuple[str, ...]
    seed: int
    base: TrainConfig
    """How the model to start from is trained."""
    learn: LearnConfig

    def key(self, number: int) -> str:
        """Digest of all that the row after `number` stages depends on."""
        values = plain_values(self.learn)
        for name in ("run", "model", "data", "checkpoint_every", "checkpoint_minutes"):
            del values[name]
        if values["document_start"] == AUTO:
            del values["document_start"]  # rows that were made before there was this setting have its default
        content = json.dumps([bound_values(self.base), values, number], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class LifelongPlan:
    """An experiment: its folder, and its streams in the order in which they are made."""

    output: Path
    lifelong: LifelongConfig
    streams: list[PlannedStream]
    facts: FactsConfig | None


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> LifelongPlan:
    """Read a recipe: a training recipe, of the base models, with the sections [lifelong], [learn], [methods.NAME].

    [learn] has keys of `LearnConfig`, which all methods share. `run` names the folder of the experiment.

    Raises:
        UserError: a file that cannot be read, a key or value that is wrong, no methods or orders.
    """
    values = read_recipe(path, overrides)
    sections = {name: values.pop(name, {}) for name in ("lifelong", "learn", "methods", "facts")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{name} = {section!r}: expected a section of keys")
    lifelong = from_dict(LifelongConfig, sections["lifelong"], prefix="lifelong.")
    domains = {
        name: from_dict(DomainConfig, domain, prefix=f"lifelong.domains.{name}.")
        for name, domain in lifelong.domains.items()
    }
    methods = {
        name: from_dict(MethodConfig, method, prefix=f"methods.{name}.") for name, method in sections["methods"].items()
    }
    facts = from_dict(FactsConfig, sections["facts"], prefix="facts.") if sections["facts"] else None
    if not isinstance(values.get("run"), str):
        raise UserError(f"{path} lacks run: add the folder to write to, or give it with --output")
    _check(lifelong, domains, methods, facts)
    output = Path(values["run"])
    base_values = values | {
        "data": {
            **values.get("data", {}),
            "folder": str(output / "data" / "base"),
            "sources": domains[lifelong.base].text,
        }
    }
    streams = []
    for seed in lifelong.seeds:
        base = from_dict(TrainConfig, base_values | {"run": str(output / "base" / f"seed={seed}"), "seed": seed})
        for order in lifelong.orders:
            for label, method in methods.items():
                if method.once and (seed, order) != (lifelong.seeds[0], lifelong.orders[0]):
                    continue
                folder = f"{label} {'-'.join(order)} seed={seed}".replace(" ", "_").replace("/", "_")
                stages = [{"name": name, **asdict(domains[name])} for name in order]
                learn = learn_values(sections["learn"], method) | {
                    "run": str(output / "streams" / folder),
                    "model": base.run,
                    "stages": stages,
                    "data": str(output / "data" / "streams"),
                    "seed": seed,
                }
                learn["memory"] |= {
                    "background": domains[lifelong.base].text,
                    "heldout": domains[lifelong.base].heldout,
                }
                config = from_dict(LearnConfig, learn, prefix="learn.")
                method_of(config.method, config.settings)
                streams.append(PlannedStream(label=label, order=order, seed=seed, base=base, learn=config))
    return LifelongPlan(output=output, lifelong=lifelong, streams=streams, facts=facts)


def learn_values(shared: Mapping[str, Any], method: MethodConfig) -> dict[str, Any]:
    """Plain values of `LearnConfig` from [learn] and a method's section."""
    return {
        **shared,
        "method": method.method,
        "settings": method.settings,
        "memory": {**shared.get("memory", {}), **method.memory},
        "optim": {**shared.get("optim", {}), **method.optim},
    }


def _check(
    lifelong: LifelongConfig,
    domains: Mapping[str, DomainConfig],
    methods: Mapping[str, MethodConfig],
    facts: FactsConfig | None,
) -> None:
    if not methods:
        raise UserError("the recipe compares nothing: add a section [methods.NAME] for each method")
    if not lifelong.orders or not lifelong.seeds:
        raise UserError("lifelong.orders and lifelong.seeds need at least one entry each")
    for name in (lifelong.base, *(name for order in lifelong.orders for name in order)):
        if name not in domains:
            raise UserError(f"there is no domain {name!r}: add a section [lifelong.domains.{name}]")
    for order in lifelong.orders:
        if lifelong.base in order or len(set(order)) < len(order) or not order:
            raise UserError(
                f"lifelong.orders has {list(order)}: give each domain but the base's, {lifelong.base}, once"
            )
    for name in (lifelong.full, *(facts.methods if facts else ())):
        if name not in methods:
            raise UserError(f"there is no method {name!r}: choose one of {listed(methods)}")
