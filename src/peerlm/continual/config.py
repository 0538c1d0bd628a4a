"""What learning without forgetting is: one frozen configuration, the stages in their order."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peerlm.errors import UserError
from peerlm.train.config import BudgetConfig, OptimConfig, added


def _require(holds: bool, key: str, value: object, fix: str) -> None:
    if not holds:
        raise UserError(f"{key} = {value!r}: {fix}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One domain that is learned."""

    name: str
    """What tables and folders call it."""
    text: tuple[str, ...]
    """Text, JSONL or parquet files to learn from; see `peerlm prepare`."""
    heldout: str | None = None
    """File that the perplexity is measured on; null: documents that are held out of the text."""

    def __post_init__(self) -> None:
        usable = bool(self.name) and "/" not in self.name and not self.name.startswith(".")
        _require(usable, "stage.name", self.name, "take a name that a folder can have")
        _require(bool(self.text), f"the text of stage {self.name!r}", self.text, "name at least one file")


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """What the model is kept to while it learns: text of what it knows, and the model that it was before the stage."""

    background: tuple[str, ...] = ()
    """Files of text like that which the model was trained on."""
    heldout: str | None = None
    """File that its perplexity is measured on; null: documents that are held out of the background."""
    remember: int = 256
    """Windows of each finished stage's text that join the background; 0: none."""
    kl: float = 0.0
    """Weight of the divergence from the model before the stage, KL(before || now) in nats per token of that text."""
    kl_windows: int = 4
    """Windows of that text on which the divergence is measured in each step."""
    replay: float = 0.0
    """Windows of that text that are replayed for each window of new text, 0 to 1."""

    def __post_init__(self) -> None:
        _require(0 <= self.kl < math.inf, "memory.kl", self.kl, "must be 0 or more, and finite")
        _require(self.kl_windows >= 1, "memory.kl_windows", self.kl_windows, "must be at least 1")
        _require(0 <= self.replay <= 1, "memory.replay", self.replay, "must be 0 or more, at most 1")
        _require(self.remember >= 0, "memory.remember", self.remember, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """A stream of domains and how they are learned, one after another."""

    run: str
    """Folder to write."""
    model: str
    """Run or saved model to start from."""
    stages: tuple[StageConfig, ...]
    """Domains, in the order in which they are learned."""
    method: Literal["full", "lora", "grow", "pack", "pool", "sparse"] = "full"
    """How the model changes; see `peerlm.continual.methods`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the method; see its class."""
    memory: RetentionConfig = field(default_factory=RetentionConfig)
    """Section [memory]."""
    budget: BudgetConfig | None = None
    """Section [budget], of each stage; tokens are those of new text. null: the method's, 120,000 tokens of most."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Section [optim]."""
    data: str | None = None
    """Folder of prepared text; null: RUN/data."""
    context: int | None = None
    """Tokens in a window; null: those that the model was trained with."""
    document_start: str = "auto"
    """What stands before each document, and begins every window: "auto", "none" or a token; see `peerlm.marks`."""
    batch_size: int = 8
    """Windows in a step."""
    heldout_windows: int | None = 128
    """Windows of each held-out text that are read at the most; null: all."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: none by steps. There is always one when the run is told to stop."""
    checkpoint_minutes: float = 5.0
    """Minutes after which there is one at the latest; 0: none by time. No weight depends on it."""
    seed: int = 0
    """Of the order of the text and of new weights."""
    precision: Literal["auto", "fp32", "bf16"] = added("auto")
    """Of matrix products in training; "auto": what the method prefers, see `peerlm.continual.method.Defaults`."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        _require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "must be 0 or more")
        _require(self.checkpoint_minutes >= 0, "checkpoint_minutes", self.checkpoint_minutes, "must be 0 or more")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "must be 0 or more and below 2**64")
        if self.optim.tables == "fused" and self.method in ("grow", "pack", "sparse"):
            raise UserError(
                f"optim.tables = 'fused' cannot be combined with method {self.method}: its backward pass updates all "
                "rows"
            )
        if self.optim.tables == "fused" and self.memory.kl:
            raise UserError(
                f"optim.tables = 'fused' cannot be combined with memory.kl = {self.memory.kl:g}, a second backward "
                "pass in each step: take 'exact'"
            )
