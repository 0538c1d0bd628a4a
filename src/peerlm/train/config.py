"""What a training run is: one frozen configuration, whose every field a recipe may set."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from peerlm.errors import UserError


def _require(config: object, prefix: str, names: str, holds: Callable[[Any], bool], fix: str) -> None:
    """Raise UserError unless `holds` is true of each of the named fields that is set."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UserError(f"{prefix}{name} = {value!r}: {fix}")


def added(default: Any) -> Any:
    """A field that was added when rows of runs were there: at its default no row's key changes (`plain_values`)."""
    return field(default=default, metadata={"added": True})


def _at_least_0(value: float) -> bool:
    return value >= 0


def _at_least_1(value: float) -> bool:
    return value >= 1


def _above_0_and_finite(value: float) -> bool:
    return 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are read, and how many at a time."""

    folder: str
    """Folder of token shards, as `peerlm prepare` writes it."""
    sources: tuple[str, ...] = ()
    """What to prepare `folder` from where that has not happened yet (see `peerlm prepare`); empty: it must
    exist."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained on `sources`."""
    holdout: float = 0.02
    """Share of the text of `sources`, by bytes, that is held out, in whole documents."""
    context: int = 256
    """Tokens in a window."""
    batch_size: int = 8
    """Windows in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int | None = None
    """Windows in one forward pass on one rank; null: all of the rank's share. Smaller ones accumulate
    gradients."""
    workers: int = 0
    """Processes that load data, per rank; 0: the training process itself."""
    prepare_workers: int = added(1)
    """Processes that tokenize `sources`; the tokens do not depend on it."""

    def __post_init__(self) -> None:
        _require(self, "data.", "folder", bool, "name the folder that `peerlm prepare` wrote")
        _require(
            self,
            "data.",
            "context",
            lambda value: value >= 2,
            "must be at least 2, a token and its successor",
        )
        _require(self, "data.", "batch_size micro_batch_size prepare_workers", _at_least_1, "must be at least 1")
        _require(self, "data.", "workers", _at_least_0, "must be 0 or more")
        _require(self, "data.", "holdout", lambda value: 0 < value < 1, "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and its clipping; shares are shares of the budget."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: half a cosine down, or the peak and then a linear decay (warmup-stable-decay)."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises linearly."""
    decay: float = 0.2
    """Share of the run in which "wsd" decays; "cosine" does not use it."""
    final: float = 0.1
    """Share of the peak learning rate that is left at the end."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.98
    """Decay of AdamW's mean of squared gradients."""
    eps: float = 1e-8
    """Added to AdamW's root of the mean square."""
    weight_decay: float = 0.01
    """Of weight matrices; tables, keys, embeddings, norms and biases have none."""
    matrices: Literal["adamw", "muon"] = added("adamw")
    """What trains weight matrices: AdamW, or Muon with steps of AdamW's size; the output head, embeddings, tables, keys
    and vectors stay with AdamW."""
    momentum: float = added(0.95)
    """Muon's decay of its mean of gradients."""
    tables: Literal["auto", "exact", "lazy", "fused", "dense"] = "auto"
    """How tables are updated: "dense" by torch.optim.AdamW, which visits every row; "exact", the same weights by rows
    that were retrieved; "fused", as exact but in the backward pass, without clipping or accumulation; "lazy", rows that
    were not retrieved stay as they are, another optimizer. "auto" takes the quicker of dense and exact."""
    table_beta1: float | None = None
    """beta1 of tables; null: that of the rest. With 0 no mean of gradients is kept. Not with tables = "dense"."""
    table_row_wise: bool = False
    """Whether tables keep one mean square per row in place of one per weight. Not with tables = "dense"."""
    table_moment_columns: int | None = added(None)
    """Columns of a table, as 128, that share one mean square in each row; null: each weight has its own. Not with
    tables = "dense"."""
    table_lr_multiplier: float = 1.0
    """Learning rate of expert tables over the learning rate of the rest."""
    table_lr_decay: bool = False
    """Whether table_lr_multiplier goes linearly to 1 over the run."""
    table_warmup: float = added(0.0)
    """Share of the run in which table_lr_multiplier rises linearly from 0, beside the warmup of all rates. Tables that
    learn later leave models time to learn to copy first."""
    keys_lr_multiplier: float = 1.0
    """Learning rate of sub-keys over the learning rate of the rest."""
    clip: float = 1.0
    """Largest norm of the gradient of everything but the tables; inf: unlimited."""
    table_clip: float = 1.0
    """Largest norm of the gradient of the tables; inf: unlimited."""

    def __post_init__(self) -> None:
        rates = "learning_rate eps table_lr_multiplier keys_lr_multiplier"
        _require(self, "optim.", rates, _above_0_and_finite, "must be above 0 and finite")
        _require(self, "optim.", "clip table_clip", lambda value: value > 0, "must be above 0")
        _require(
            self, "optim.", "warmup decay final table_warmup", lambda value: 0 <= value <= 1, "must lie from 0 to 1"
        )
        betas = "beta1 beta2 momentum" if self.table_beta1 is None else "beta1 beta2 momentum table_beta1"
        _require(self, "optim.", betas, lambda value: 0 <= value < 1, "must be 0 or more, below 1")
        _require(self, "optim.", "weight_decay", _at_least_0, "must be 0 or more")
        _require(self, "optim.", "table_moment_columns", _at_least_1, "must be at least 1")
        if self.table_row_wise and self.table_moment_columns is not None:
            raise UserError("optim.table_row_wise and optim.table_moment_columns are both set: choose one of them")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(f"optim.warmup + optim.decay = {self.warmup + self.decay:g}: must be at most 1")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """When training ends: exactly one of these, of which no more is spent than whole steps fit into."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Tokens read."""
    flops: float | None = None
    """Training FLOPs as `peerlm.accounting` counts them."""
    minutes: float | None = None
    """Minutes of training; evaluation and checkpoints do not count."""

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise UserError(f"budget sets {names} of steps, tokens, flops, minutes: set exactly one")
        _require(self, "budget.", given[0], _above_0_and_finite, "must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on how much held-out text the loss is measured."""

    every: int = 0
    """Steps between evaluations during training; 0: only at the end."""
    windows: int | None = 64
    """Held-out windows read during training; null: all."""
    final_windows: int | None = None
    """Held-out windows read at the end; null: all."""
    batch_size: int = 8
    """Windows in one forward pass on one rank."""
    copying: bool = added(False)
    """Whether every evaluation also measures what the model copies from its context (`peerlm.evaluate.copying`)."""

    def __post_init__(self) -> None:
        _require(self, "eval.", "every", _at_least_0, "must be 0 or more")
        _require(self, "eval.", "windows final_windows batch_size", _at_least_1, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's whole state is saved, and how often over."""

    every: int = 0
    """Steps between checkpoints; 0: none by steps. There is always one at the end, and when the run is told to stop."""
    minutes: float = 5.0
    """Minutes after which there is one at the latest, which is what a kill costs; 0: none by time. No weight depends on
    it."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    background: bool = False
    """Whether each rank copies its part of a checkpoint and writes it, in shards, during later steps. The copy
    takes as much memory as the model with its optimizer's state."""

    def __post_init__(self) -> None:
        _require(self, "checkpoint.", "every minutes", _at_least_0, "must be 0 or more")
        _require(self, "checkpoint.", "keep", _at_least_1, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between rows of log.jsonl."""
    tensorboard: bool = False
    """Whether the rows go to RUN/tensorboard too."""

    def __post_init__(self) -> None:
        _require(self, "log.", "every", _at_least_1, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """Growth of PEER layers and product-key memories within the run (`peerlm.growth.grow`)."""

    at: str = ""
    """Sub-keys of each half, and the share of the budget at which layers grow to them: "256@50%,512@75%"."""
    opening: float = 0.05
    """Share of the budget within which new experts are let in, from not there to like any other."""
    keys: Literal["random", "crowded", "data"] = "crowded"
    """Where new sub-keys start: as at initialisation; near those used most; or at queries."""
    freeze: tuple[str, ...] = ()
    """What is frozen from a growth on: of "rows" (old experts), "keys" (old sub-keys), "query", "rest" (all
    outside of the layers)."""

    def __post_init__(self) -> None:
        _require(self, "grow.", "opening", lambda value: 0 <= value < 1, "must be 0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How tables are sharded over the processes of torchrun; docs/parallel.md. Without rows and cols they are whole."""

    rows: int | None = None
    """Processes that the rows of a table are cut over, those of one node; null: those that cols leaves."""
    cols: int | None = None
    """Processes that the columns of a table are cut over, one of each node; null: those that rows leaves."""
    replica: int = added(1)
    """Copies of each table: rows * cols * replica is the number of processes."""
    dense: Literal["shard", "replicate"] = "shard"
    """How all else lies: cut over all processes by FSDP2, or whole on each."""

    def __post_init__(self) -> None:
        _require(self, "parallel.", "rows cols replica", _at_least_1, "must be at least 1")
        if self.replica > 1 and not self.sharded:
            raise UserError(
                f"parallel.replica = {self.replica} is of tables that are cut: set parallel.rows or parallel.cols too"
            )

    @property
    def sharded(self) -> bool:
        """Whether tables are sharded."""
        return self.rows is not None or self.cols is not None


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Where rows of tables are while they are trained; docs/tables.md."""

    folder: str = ""
    """Folder for files of rows and of their optimizer's state, which may be larger than memory; empty: all in memory.
    Each run needs a folder of its own."""
    cache: str = ""
    """How much of the files may stay in memory, such as "4 GB"; empty: as much as the system likes."""
    device_rows: int = 0
    """On a GPU: for how many rows of each table, with what the optimizer keeps of them, it has places. At least as
    many as a step looks up."""

    def __post_init__(self) -> None:
        _require(self, "tables.", "device_rows", lambda value: value >= 0, "must be 0 or more")
        _require(self, "tables.", "cache", lambda value: not value or _bytes(value) > 0, 'must be a size like "4 GB"')

    @property
    def cache_bytes(self) -> int | None:
        """The cache; None: no bound."""
        return _bytes(self.cache) if self.cache else None


def _bytes(text: str) -> int:
    """A size such as "4 GB" or "500 MiB"; 0 where it is none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT]i?)?B\s*", text)
    if match is None:
        return 0
    number, unit = match.groups()
    power = "kMGT".index(unit[0]) + 1 if unit else 0
    return int(float(number) * (1024 if unit and unit.endswith("i") else 1000) ** power)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: a recipe's sections and the few settings above them."""

    run: str
    """Folder the run is written to."""
    data: DataConfig
    """Section [data]."""
    budget: BudgetConfig
    """Section [budget]."""
    model: dict[str, Any] = field(default_factory=dict)
    """Section [model]: keyword arguments of `peerlm.model.PeerConfig`; vocab_size comes from the data."""
    optim: OptimConfig = OptimConfig()
    """Section [optim]."""
    grow: GrowConfig = GrowConfig()
    """Section [grow]."""
    eval: EvalConfig = EvalConfig()
    """Section [eval]."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Section [checkpoint]."""
    log: LogConfig = LogConfig()
    """Section [log]."""
    parallel: ParallelConfig = field(default=ParallelConfig(), metadata={"added": True})
    """Section [parallel]."""
    tables: TablesConfig = field(default=TablesConfig(), metadata={"added": True})
    """Section [tables]."""
    seed: int = 0
    """Sets initial weights, the order of the data and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto": CUDA where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products; "bf16" is autocast, the weights stay float32."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which saves memory and costs time."""
    compile: bool = False
    """Whether torch.compile compiles the model."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Whether a step is captured in a CUDA graph, which takes one launch: "auto" where it can be; "on" says why not."""
    watchdog_minutes: float = 60.0
    """Minutes that one step may take before the process prints where it hangs, and ends with exit code 70; 0: any."""

    def __post_init__(self) -> None:
        _require(self, "", "run", bool, "name the folder to write the run to")
        _require(self, "", "watchdog_minutes", lambda value: 0 <= value < math.inf, "must be 0 or more, and finite")
        _require(self, "", "seed", lambda value: 0 <= value < 2**64, "must be 0 or more and below 2**64")
        if self.parallel.sharded:
            self.check_cut(cols=self.parallel.cols or 1, replica=self.parallel.replica)

    def check_cut(self, *, cols: int, replica: int) -> None:
        """Raise UserError where tables that are cut over a mesh of this shape cannot be trained as is configured."""
        optim, formats = self.optim, _scaled_formats(self.model)
        if optim.tables == "dense":
            raise UserError(
                "optim.tables = 'dense' cannot be combined with [parallel]: leave it out, or set it to 'exact'"
            )
        if optim.matrices == "muon" and self.parallel.dense == "shard":
            raise UserError("optim.matrices = 'muon' needs whole matrices: set parallel.dense = 'replicate'")
        if cols > 1 and formats:
            raise UserError(
                f"row_format = {formats[0]!r} has scales of whole vectors, which cols = {cols} would cut: set "
                "parallel.cols = 1, and cut rows alone"
            )
        if cols > 1 and optim.table_row_wise and not optim.table_moment_columns:
            raise UserError(
                f"optim.table_row_wise = true needs all columns of a row, which cols = {cols} cuts: set "
                "optim.table_moment_columns = 128 in its place"
            )
        if replica > 1 and (optim.tables == "fused" or formats):
            what = f"row_format = {formats[0]!r}, which is trained by it," if formats else "It"
            raise UserError(
                f"optim.tables = 'fused' updates rows before copies average their gradients. {what} cannot be combined "
                f"with parallel.replica = {replica}: set that to 1"
            )


def _scaled_formats(model: dict[str, Any]) -> list[str]:
    """Those of a recipe's formats of rows that have scales."""
    named = [layer["row_format"] for layer in model.values() if isinstance(layer, dict) and "row_format" in layer]
    if not named:
        return []
    from peerlm.layers.table import ROW_FORMATS
    from peerlm.ops.row_formats import SCALED_DTYPES

    return [name for name in named if ROW_FORMATS.get(name) in SCALED_DTYPES]


UNBOUND_KEYS = (
    "run",
    "eval",
    "checkpoint",
    "log",
    "parallel",
    "tables",
    "data.workers",
    "data.prepare_workers",
    "graph",
    "watchdog_minutes",
)
"""Keys, or sections, that a resumed run may change: the weights do not depend on them."""
