"""A pack for each domain: experts in a folder of their own, beside a frozen model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual.lower_blocks import forget_lower_blocks, lower_blocks_of, remember_lower_blocks
from peerlm.continual.method import PRETRAINED, Defaults, Method, Stage, freeze, peer_layers
from peerlm.errors import UserError
from peerlm.evaluate.loading import load_model
from peerlm.evaluate.progress import progress_bar
from peerlm.files import write_json
from peerlm.packs.api import new_pack, save_pack
from peerlm.packs.base_hash import own_peer_layers
from peerlm.packs.files import check_pack_name
from peerlm.packs.fit import TOKENS, fit_gates, foreign_power
from peerlm.packs.plain import check_plain, experts_within, holders
from peerlm.usage import ExpertUsage

PACK = "pack"
"""Folder of the pack within that of a stage."""
GATES = "gates.json"
"""How often the gates of a stage's pack open, in the folder of the stage."""
_TOKENS_AT_ONCE = 1024
"""Tokens in a batch of those that gates are fitted on."""


@dataclass(frozen=True, kw_only=True)
class PackPerStage(Method):
    """Train a new pack (`peerlm.packs.api`) in each stage, with those of the stages before it loaded and frozen.

    The model never changes; a stage leaves its pack alone, named as the domain. In a model with PEER layers the pack's
    experts join the layers' own. In any other model it lies beside the feed-forward layers, behind gates that are
    fitted on the new text, the background and earlier stages' text; blocks below the lowest of these
    layers are computed once per window.
    """

    experts: int | None = None
    """Experts of the pack in each layer, a square number; null: 64^2 in PEER layers, otherwise as `megabytes` says."""
    layers: tuple[str, ...] = ()
    """Paths of the layers; empty: all PEER layers, or all feed-forward layers."""
    megabytes: float = 19.0
    """Beside feed-forward layers: size of the pack at the most, where `experts` is not given."""
    epochs: float = 1.0
    """Beside feed-forward layers: how often the text is read, where no budget is given."""
    keep: float = 0.99
    """Beside feed-forward layers: share of the new text's tokens that open the gates at the most."""
    gate_tokens: int = TOKENS
    """Beside feed-forward layers: tokens of the new text that the gates are fitted on at the most; half as many again
    of other text, of which a third only tells how well they fit."""
    rate: float = 10.0
    """Beside feed-forward layers: learning rate of experts over that of the rest, times `optim.table_lr_multiplier`."""
    quiet: float = 1.0
    """Beside feed-forward layers: weight of what the pack writes for foreign tokens that open its gates."""

    def __post_init__(self) -> None:
        for name in ("megabytes", "epochs", "rate", "gate_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"pack.{name} = {getattr(self, name)}: must be above 0")
        if not 0 < self.keep <= 1:
            raise UserError(f"pack.keep = {self.keep}: must be above 0, at most 1")

    def defaults(self, model: nn.Module) -> Defaults:
        """Of a model without experts: the text is read once, the embedded corpus is the background."""
        if own_peer_layers(model):
            return Defaults()
        return replace(PRETRAINED, epochs=self.epochs, table_rate=self.rate)

    def load(self, base: Path, earlier: list[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The base with the packs of the stages before."""
        return load_model(base, [folder / PACK for folder in earlier])

    def check(self, model: nn.Module, source: str) -> None:
        """Refuse a model that has neither PEER layers nor feed-forward layers."""
        if not peer_layers(model):
            try:
                check_plain(model)
            except ValueError as error:
                raise UserError(f"{source} takes no pack: {error}") from error

    def check_name(self, stage: str) -> None:
        """A pack is called as the domain."""
        try:
            check_pack_name(stage)
        except ValueError as error:
            raise UserError(f"{error}; name the text, --text NAME=FILE") from error

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze all that is there, and add the pack."""
        freeze(model)
        plain, layers = not own_peer_layers(model), self.layers or None
        try:
            experts = self.experts or (experts_within(model, layers, self.megabytes) if plain else 64**2)
            new_pack(model, stage.name, experts, layers=layers, seed=stage.seed)
        except ValueError as error:
            raise UserError(f"no pack can be made for {stage.name!r}: {error}") from error
        if plain:
            self._prepare_plain(model, stage)
        return model

    def _prepare_plain(self, model: PreTrainedModel, stage: Stage) -> None:
        """Remember what is below the pack, and fit its gates."""
        model.eval()
        if lower := lower_blocks_of(model, list(holders(model))):
            remember_lower_blocks(model, lower, stage.folder, len(stage.new))
        assert stage.earlier is not None  # the embedded corpus at least
        windows = max(2, self.gate_tokens // len(stage.new[0]))
        step = max(1, len(stage.new) // windows)
        own = [stage.new[place] for place in range(0, len(stage.new), step)][:windows]
        other = [*stage.earlier.draw(0, windows * 3 // 2)]
        at_once = max(1, _TOKENS_AT_ONCE // len(stage.new[0]))
        own, other = (
            [batch.to(model.device) for batch in torch.stack(begun(text, stage.start)).split(at_once)]
            for text in (own, other)
        )
        autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=stage.bf16)
        with progress_bar(shown=stage.progress) as bar, autocast:
            task = bar.add_task("fitting the gates", total=len(own) + len(other))
            shares = fit_gates(
                model, stage.name, own, other, keep=self.keep, advance=lambda: bar.update(task, advance=1)
            )
        write_json(stage.folder / GATES, shares)

    def found(self, model: nn.Module, stage: Stage) -> dict[str, Any]:
        """Shares of tokens on which the pack speaks."""
        path = stage.folder / GATES
        return {"gates": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}

    def train_mode(self, model: nn.Module) -> None:
        """Beside feed-forward layers what is frozen stays in evaluation mode, without dropout."""
        if own_peer_layers(model):
            model.train()
            return
        model.eval()
        for holder in holders(model).values():
            holder.train()

    def restrict(self, model: nn.Module, stage: Stage, usage: Mapping[str, ExpertUsage], step: int) -> None:
        """Add the gradient of what the pack writes for foreign text."""
        if self.quiet and not own_peer_layers(model):
            (self.quiet * foreign_power(model, stage.name, step)).backward()

    def finish(self, model: nn.Module) -> PreTrainedModel:
        """The model with the pack."""
        forget_lower_blocks(model)
        return model  # type: ignore[return-value]

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        """The pack alone."""
        found = self.found(model, stage)
        save_pack(model, stage.name, stage.folder / PACK, data={"domain": stage.name}, metrics=found or None)


def begun(windows: Sequence[Tensor], start: Sequence[int]) -> list[Tensor]:
    """Let every second window begin as a document does.

    Without this a text of short documents has many such beginnings, and one of long documents hardly any. Gates would
    then tell beginnings from the rest, open at that of any text, and stay closed at that of a question.

    Args:
        windows: (context,) int64 each.
        start: token ids before a document; what is pushed out at the end of a window is dropped.
    """
    mark = torch.tensor(start, dtype=torch.long)
    return [
        window if number % 2 or torch.equal(window[: len(mark)], mark) else torch.cat([mark, window])[: len(window)]
        for number, window in enumerate(windows)
    ]
