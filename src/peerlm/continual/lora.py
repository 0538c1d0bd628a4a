"""LoRA: low-rank matrices beside frozen ones, merged into them after each stage."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from peerlm.continual.method import PRETRAINED, Defaults, Method, Stage
from peerlm.errors import UserError
from peerlm.evaluate.adapter import without_deprecations
from peerlm.packs.base_hash import own_peer_layers


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """LoRA (Hu 2021, arXiv 2106.09685) by peft, in all linear layers but the output matrix, scaled by alpha / rank.

    After a stage it is merged, so that the model is one like any other and the next stage starts a new one beside it.
    """

    rank: int = 16
    """Of the matrices."""
    alpha: float | None = None
    """Of the scale alpha / rank; null: the rank."""
    target_modules: tuple[str, ...] = ()
    """Names of layers, as peft matches them; empty: all linear layers but the output matrix."""

    def defaults(self, model: nn.Module) -> Defaults:
        """Of a model without experts those of packs, so that both can be compared."""
        return Defaults() if own_peer_layers(model) else PRETRAINED

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze the model and put LoRA beside its linear layers."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UserError('method lora needs peft: pip install "peerlm[peft]"') from error
        try:
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
                target_modules=list(self.target_modules) or "all-linear",
                task_type="CAUSAL_LM",
            )
            with without_deprecations():
                return cast("nn.Module", get_peft_model(model, config))
        except ValueError as error:
            raise UserError(f"no LoRA of these settings fits the model: {error}") from error

    def finish(self, model: nn.Module) -> PreTrainedModel:
        """Merge."""
        merge: Any = model
        return cast("PreTrainedModel", merge.merge_and_unload())
