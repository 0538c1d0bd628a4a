"""A pack for each domain: experts in a folder of their own, beside a frozen model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual.method import Method, Stage, freeze
from peerlm.errors import UserError
from peerlm.evaluate.loading import load_model
from peerlm.packs.api import load_pack, new_pack, save_pack
from peerlm.packs.files import check_pack_name

PACK = "pack"
"""Folder of the pack within that of a stage."""


@dataclass(frozen=True, kw_only=True)
class PackPerStage(Method):
    """Train a new pack (`peerlm.packs.api`) in each stage, with those of the stages before it loaded and frozen.

    The model never changes; a stage leaves its pack alone, named as the domain.
    """

    experts: int = 64**2
    """Experts of the pack in each PEER layer, a square number."""

    @property
    def needs_experts(self) -> bool:
        """It does."""
        return True

    def load(self, base: Path, earlier: list[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The base with the packs of the stages before."""
        model, tokenizer = load_model(base)
        for folder in earlier:
            load_pack(model, folder / PACK)
        return model, tokenizer

    def check_name(self, stage: str) -> None:
        """A pack is called as the domain."""
        try:
            check_pack_name(stage)
        except ValueError as error:
            raise UserError(f"{error}; name the text, --text NAME=FILE") from error

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze all that is there, and add the pack."""
        freeze(model)
        try:
            new_pack(model, stage.name, self.experts, seed=stage.seed)
        except ValueError as error:
            raise UserError(f"no pack can be made for {stage.name!r}: {error}") from error
        return model

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        """The pack alone."""
        save_pack(model, stage.name, stage.folder / PACK, data={"domain": stage.name})
