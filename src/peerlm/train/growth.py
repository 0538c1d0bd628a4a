"""Growth within a run: how far its layers grow, at which share of the budget, and how new experts are let in."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peerlm.accounting import model_cost
from peerlm.data import batches
from peerlm.errors import UserError
from peerlm.growth import freeze_grown, grow, observe, set_opening
from peerlm.growth.freezing import PARTS, Frozen
from peerlm.growth.indexed import find_indexed_layers
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import GrowConfig
from peerlm.train.training import Hook, Role, Training, place


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
        layers = find_indexed_layers(model)
    except ValueError as error:
        raise UserError(f"grow.at is given, but {error}: leave it out") from error
    for growth in growths:
        for layer in layers:
            if growth.sub_keys**2 <= layer.index.num_experts:
                raise UserError(
                    f"grow.at has {growth.sub_keys} sub-keys, {growth.sub_keys**2} experts, but {layer.where()} begins "
                    f"with {layer.index.num_experts}: give more"
                )


def training_flops(model: PreTrainedModel, growths: Iterable[Growth], context: int) -> list[int]:
    """Training FLOPs per token at the start and after each growth, the latter counted on models without weights."""
    flops = [model_cost(model, context).training_flops_per_token]
    for growth in growths:
        config = copy.deepcopy(model.config)
        for kind, name in (("peer", "num_experts"), ("pkm", "num_values")):
            setattr(config, kind, {**(getattr(config, kind) or {}), name: growth.sub_keys**2})
        with torch.device("meta"):
            flops.append(model_cost(type(model)(config), context).training_flops_per_token)
    return flops


class Growing(Hook):
    """Lets all layers grow at their shares of the budget.

    Args:
        growths: in order; `TrainState.growths` says how many have been made.
    """

    def __init__(self, growths: tuple[Growth, ...]) -> None:
        self.growths = growths
        self.frozen: Frozen | None = None

    def before_loading(self, training: Training, state: TrainState) -> None:
        """Grow as often as the layers of the checkpoint had."""
        for number, growth in enumerate(self.growths[: state.growths], start=1):
            grow(training.model, growth.sub_keys**2, optimizer=training.optimizer)
            if number == state.growths:
                self.frozen = freeze_old(training.model, training.config.grow, training.optimizer)
            if number < state.growths or state.opening == 1:
                set_opening(training.model, 1)
        _adapt(training)

    def role(self, training: Training, state: TrainState) -> Role:
        """While new experts are let in, Python reads how far."""
        return Role.NONE if state.opening == 1 else Role.DECIDES

    def before_step(self, training: Training, state: TrainState, progress: float) -> TrainState:
        """Grow where it is due, and let new experts in as far as they should be."""
        while state.growths < training.budget.changes_due(state.step, state.seconds):
            state = self._grow(training, state)
        return self._open(training, state, progress)

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """Open at the end: the last step of a budget of minutes may take longer than foreseen."""
        return self._open(training, state, 1.0) if done else state

    def _grow(self, training: Training, state: TrainState) -> TrainState:
        """Let the layers grow, closed; what new keys are chosen by is what the next steps will read."""
        growth, seed = self.growths[state.growths], training.config.seed
        state = self._open(training, state, growth.share)  # a budget of minutes may pass two shares in one step
        coming = batches(training.windows, batch_size=8, seed=seed, position=state.position)
        samples = ({"input_ids": batch["input_ids"]} for batch in islice(coming, 8))
        if self.frozen is not None:
            self.frozen.remove()
        self.frozen = grow_once(
            training.model,
            growth,
            training.config.grow,
            optimizer=training.optimizer,
            samples=samples,
            seed=seed + 1 + state.growths,
        )
        _adapt(training)
        training.write({**place(state), "grown_to": growth.sub_keys**2})
        training.display.note(f"step {state.step}  grown to {growth.sub_keys**2:,} experts")
        return replace(state, growths=state.growths + 1, opening=0.0)

    def _open(self, training: Training, state: TrainState, progress: float) -> TrainState:
        if state.opening == 1:
            return state
        opening = opening_at(training.config.grow, self.growths, state.growths, progress)
        set_opening(training.model, opening)
        return replace(state, opening=opening)


def _adapt(training: Training) -> None:
    """Wrap the model again, whose parameters are others now, and count what a step costs."""
    training.wrap()
    cost = model_cost(training.model, training.config.data.context)
    training.flops_per_step = training.tokens_per_step * cost.training_flops_per_token


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
    """Let all layers grow and, where the configuration says so, freeze what they had; returns that."""
    seen = {} if config.keys == "random" else vars(observe(model, samples))
    grow(model, growth.sub_keys**2, keys=config.keys, optimizer=optimizer, seed=seed, **seen)
    return freeze_old(model, config, optimizer)


def freeze_old(model: nn.Module, config: GrowConfig, optimizer: torch.optim.Optimizer) -> Frozen | None:
    """Freeze what the layers had before their last growth, where `grow.freeze` says so."""
    return freeze_grown(model, config.freeze, optimizer=optimizer) if config.freeze else None
