"""What every way to learn has in common: what it changes of a model, and what is left of that after a stage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual.retention import ReplayBuffer
from peerlm.errors import UserError
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.loading import load_model
from peerlm.files import atomic_folder
from peerlm.layers import PEER, Table
from peerlm.layers.query_norm import QueryBatchNorm
from peerlm.train.checkpoint import save_model
from peerlm.usage import ExpertUsage

MODEL = "model"
"""Folder of the model within that of a stage."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a method may know of the stage that it prepares a model for."""

    name: str
    """Of the domain."""
    folder: Path
    """Of the stage, where a method may keep files."""
    seed: int
    """Of what is random."""
    earlier: ReplayBuffer | None
    """Text that must not be forgotten; None where there is none."""
    new: Windows
    """Windows of the text that is learned."""
    start: tuple[int, ...] = ()
    """Token ids before a document; empty: nothing."""
    bf16: bool = False
    """Whether matrix products of its training are bfloat16."""
    progress: bool = False
    """Whether to show how far work before the first step is."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds for settings of a stream that are not given."""

    epochs: float | None = None
    """Budget of a stage: how often its text is read; None: 120,000 tokens, whatever the text."""
    context: int | None = None
    """Tokens in a window at the most, of a model that no run has trained; None: what the model reads."""
    background: tuple[str, ...] = ()
    """Text like that which the model was trained on."""
    heldout_windows: int | None = None
    """Windows of each held-out text that are read at the most."""
    micro_batch_size: int | None = None
    """Windows in a forward pass of training; None: those of a step."""
    table_rate: float = 1.0
    """Factor of `optim.table_lr_multiplier`."""
    bf16: bool = False
    """Whether matrix products of training are bfloat16 where the processor has such instructions."""


PRETRAINED = Defaults(epochs=1.0, context=512, background=("demo",), heldout_windows=24, micro_batch_size=2, bf16=True)
"""Of a model without experts that is frozen: methods with these are measured on the same windows of the same texts."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Learn with all weights: full finetuning, and what the other methods change of it."""

    @property
    def needs_experts(self) -> bool:
        """Whether a model without PEER layers is refused."""
        return False

    @property
    def lazy(self) -> bool:
        """Whether rows of tables that a step does not train stay as they are, and what the optimizer knows of them."""
        return False

    def load(self, base: Path, earlier: list[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model that a stage starts from, given the folders of the stages before it."""
        return load_model(earlier[-1] / MODEL if earlier else base)

    def defaults(self, model: nn.Module) -> Defaults:
        """What holds for settings of a stream from this model that are not given."""
        return Defaults()

    def check(self, model: nn.Module, source: str) -> None:
        """Raise UserError where this method cannot work on the model."""
        if self.needs_experts and not peer_layers(model):
            raise UserError(
                f"{source} has no PEER layers, whose experts this method trains: choose --method full or lora, or put "
                "experts in with `peerlm convert`"
            )

    def check_name(self, stage: str) -> None:
        """Raise UserError where this method cannot keep what it learns under the name of a stage."""

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze and add, in place, what the method freezes and adds; returns what is to be trained."""
        check_rows(model)
        return model

    def train_mode(self, model: nn.Module) -> None:
        """Put the model in training mode."""
        model.train()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Mapping[str, ExpertUsage]]:
        """The context of the forward passes over new text."""
        yield {}

    def restrict(self, model: nn.Module, stage: Stage, usage: Mapping[str, ExpertUsage], step: int) -> None:
        """Drop gradients of what the method freezes in this step, or add some; `usage` is what `watching` gave."""

    def found(self, model: nn.Module, stage: Stage) -> dict[str, Any]:
        """What `prepare` found out, for the row of the stage."""
        return {}

    def finish(self, model: nn.Module) -> PreTrainedModel:
        """The model after a stage."""
        return model  # type: ignore[return-value]

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        """Write what is left of a stage into its folder."""
        with atomic_folder(stage.folder / MODEL) as partial:
            save_model(partial, model, tokenizer)


def peer_layers(model: nn.Module) -> dict[str, PEER]:
    """The PEER layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PEER)}


def check_rows(model: nn.Module) -> None:
    """Raise UserError where experts are stored in a format that is not trained."""
    for name, layer in peer_layers(model).items():
        if not layer.experts.has_gradients:
            raise UserError(
                f"the experts of {name} are stored as {layer.experts.row_format}, in which no method trains them: take "
                "the model as it was before, or --method pack"
            )


def freeze(model: nn.Module) -> None:
    """Let no parameter of the model be trained, nor rows of 8 bits."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Table):
            module.trained_in_place = False


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Training mode, except that query norms keep their running statistics, which old experts depend on.

    Those that are frozen do so anyway (`QueryBatchNorm`); this is for those whose weights are trained.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.eval()
