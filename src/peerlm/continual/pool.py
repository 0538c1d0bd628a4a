"""A pool of low-rank experts beside frozen layers, which every stage trains further."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual.method import PRETRAINED, Defaults, Method, Stage, peer_layers
from peerlm.convert.ffws import find_ffws
from peerlm.errors import UserError
from peerlm.evaluate.adapter import put_adapter, without_deprecations
from peerlm.evaluate.loading import load_model
from peerlm.files import atomic_folder
from peerlm.packs.base_hash import own_peer_layers

ADAPTER = "adapter"
"""Folder of the pool within that of a stage, in peft's format."""


@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Train one adapter pool (`peerlm.adapters`) beside a frozen model, from stage to stage.

    Each token retrieves its own experts of the pool, so that it cannot be merged into weights. What is left of a stage
    is the pool as it is then.
    """

    num_experts: int = 144
    """Of the pool beside each layer, a square number."""
    heads: int = 1
    """Queries of a token in each layer."""
    experts_per_head: int | None = None
    """Experts that each query retrieves; null: 16, or as many as there are sub-keys for."""
    key_dim: int = 32
    """Size of a query, even."""
    rank: int = 1
    """Neurons of an expert."""
    activation: str = "identity"
    """Of neurons; with "identity" an expert is a LoRA of this rank."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, as peft matches them, or "all-linear" alone; empty: all feed-forward layers."""
    rate: float = 1.0
    """Learning rate of experts over that of the rest, times `optim.table_lr_multiplier`."""

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"pool.rate = {self.rate}: must be above 0")

    def defaults(self, model: nn.Module) -> Defaults:
        """Of a model without experts those of packs, so that both can be compared."""
        return Defaults() if own_peer_layers(model) else replace(PRETRAINED, table_rate=self.rate)

    def load(self, base: Path, earlier: list[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The base with the pool as the last stage has left it."""
        model, tokenizer = load_model(base)
        return (put_adapter(model, earlier[-1] / ADAPTER, trained=True) if earlier else model), tokenizer

    def check(self, model: nn.Module, source: str) -> None:
        """Refuse a model without feed-forward layers, where others are not named."""
        if not self.target_modules:
            _ffws(model)

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze the model, and put a new pool beside its layers where no stage has left one."""
        try:
            from peft import PeftModel, get_peft_model

            from peerlm.adapters.config import PeerAdapterConfig
        except ImportError as error:
            raise UserError('method pool needs peft: pip install "peerlm[peft]"') from error
        given: nn.Module = model
        if isinstance(given, PeftModel):
            return given
        retrieved = self.experts_per_head or min(16, math.isqrt(max(1, self.num_experts)))
        targets, dim = ([*self.target_modules], None) if self.target_modules else _ffws(model)
        try:
            config = PeerAdapterConfig(
                num_experts=self.num_experts,
                heads=self.heads,
                experts_per_head=retrieved,
                key_dim=self.key_dim,
                rank=self.rank,
                activation=self.activation,
                weight_scale=float(retrieved),
                target_modules=targets[0] if targets == ["all-linear"] else targets,
                module_dim=dim,
                task_type="CAUSAL_LM",
            )
            with without_deprecations():
                return get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise UserError(f"no pool of these settings fits the model: {error}") from error

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        """The pool alone."""
        with atomic_folder(stage.folder / ADAPTER) as partial:
            cast("Any", model).save_pretrained(str(partial))


def _ffws(model: nn.Module) -> tuple[list[str], int | None]:
    """Paths of the feed-forward layers, and their width where they do not know it."""
    if own := peer_layers(model):
        return list(own), None
    try:
        ffws = find_ffws(cast(PreTrainedModel, model))
    except ValueError as error:
        raise UserError(f"a pool has no place in this model: {error}; or name layers, target_modules") from error
    return [ffw.path for ffw in ffws], ffws[0].dim
