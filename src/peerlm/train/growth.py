"""Growth within a run: how far its layers grow, at which share of the budget, and how new experts are let in."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peerlm.accounting import model_cost
from peerlm.errors import UserError
from peerlm.growth import freeze_grown, grow, observe
from peerlm.growth.freezing import PARTS, Frozen
from peerlm.growth.indexed import find_pools
from peerlm.train.config import GrowConfig


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One growth of all layers."""

    sub_keys: int
    """n, sub-keys for each half afterwards; there are n * n experts."""
    share: float
    """Of the budget that is spent before it."""


def read_growths(config: GrowConfig) -> tuple[Growth, ...]:
    """What `grow.at`, such as "256@50%,512@75%", says, in order; nothing where it is empty.

    Raises:
        UserError: it says nothing that can be done.
    """
    growths = []
    for part in config.at.split(",") if config.at else []:
        sub_keys, _, share = part.strip().partition("@")
        try:
            number = float(share[:-1]) / 100 if share.endswith("%") else float(share)
            growths.append(Growth(sub_keys=int(sub_keys), share=number))
        except ValueError as error:
            raise UserError(
                f"grow.at = {config.at!r}: {part.strip()!r} is not SUB_KEYS@SHARE; write it as in 256@50%,512@75%"
            ) from error
    shares = [growth.share for growth in growths]
    for earlier, later in itertools.pairwise(growths):
        if later.sub_keys <= earlier.sub_keys or later.share <= earlier.share:
            raise UserError(f"grow.at = {config.at!r}: each growth must be larger and later than the one before")
    if growths and not (shares[0] > 0 and shares[-1] < 1):
        raise UserError(f"grow.at = {config.at!r}: shares of the budget lie between 0% and 100%")
    for begin, end in itertools.pairwise([*shares, 1.0]):
        if begin + config.opening > end:
            raise UserError(
                f"grow.opening = {config.opening:g}: what is added at {begin:.0%} of the budget must be open by "
                f"{end:.0%}; lower it"
            )
    for part in config.freeze:
        if part not in PARTS:
            raise UserError(f"grow.freeze has {part!r}: choose of {', '.join(PARTS)}")
    return tuple(growths)


def with_shells(model_settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's [model] in which experts are numbered so that layers can grow."""
    settings = dict(model_settings)
    for kind in ("peer", "pkm"):
        settings[kind] = {"pairing": "shells", **(settings.get(kind) or {})}
        if settings[kind]["pairing"] != "shells":
            raise UserError(f"model.{kind}.pairing = {settings[kind]['pairing']!r}: layers that grow need 'shells'")
    return settings


def check_growths(model: nn.Module, growths: Iterable[Growth]) -> None:
    """Raise a UserError where the layers of a new model cannot grow so."""
    try:
        pools = find_pools(model)
    except ValueError as error:
        raise UserError(f"grow.at is given, but {error}: leave it out") from error
    for growth in growths:
        for pool in pools:
            if growth.sub_keys**2 <= pool.keys.num_experts:
                raise UserError(
                    f"grow.at has {growth.sub_keys} sub-keys, {growth.sub_keys**2} experts, but {pool.where()} begins "
                    f"with {pool.keys.num_experts}: give more"
                )


def flops_after(model: PreTrainedModel, growths: Iterable[Growth], context: int) -> list[int]:
    """Training FLOPs per token after each growth, counted on models without memory."""
    flops = []
    for growth in growths:
        config = copy.deepcopy(model.config)
        for kind, name in (("peer", "num_experts"), ("pkm", "num_values")):
            setattr(config, kind, {**(getattr(config, kind) or {}), name: growth.sub_keys**2})
        with torch.device("meta"):
            flops.append(model_cost(type(model)(config), context).training_flops_per_token)
    return flops


def opening_at(config: GrowConfig, growths: tuple[Growth, ...], done: int, progress: float) -> float:
    """How far the experts of the last of `done` growths are open at this share of the budget."""
    if not done:
        return 1.0
    since = progress - growths[done - 1].share
    return 1.0 if since >= config.opening - 1e-9 else max(since, 0.0) / config.opening  # 0.7 - 0.4 is less than 0.3


def grow_once(
    model: nn.Module,
    growth: Growth,
    config: GrowConfig,
    *,
    optimizer: torch.optim.Optimizer,
    samples: Iterable[Mapping[str, Any]],
    seed: int,
) -> Frozen | None:
    """Let all layers grow and, where the configuration says so, hold still what they had; returns that."""
    seen = {} if config.keys == "random" else vars(observe(model, samples))
    grow(model, growth.sub_keys**2, keys=config.keys, optimizer=optimizer, seed=seed, **seen)
    return hold_still(model, config, optimizer)


def hold_still(model: nn.Module, config: GrowConfig, optimizer: torch.optim.Optimizer) -> Frozen | None:
    """Hold what the layers had before their last growth, where `grow.freeze` says so."""
    return freeze_grown(model, config.freeze, optimizer=optimizer) if config.freeze else None
