"""What a training loop works on: a model, its optimizer, its text, its budget, and hooks for all else that happens."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peerlm.data import TokenWindows
from peerlm.layers import share_statistics
from peerlm.optim import keep_learning_rates_on
from peerlm.parallel import compile_dense, exchange_gradients
from peerlm.ranks import Ranks
from peerlm.train.budget import Budget
from peerlm.train.captured import GRAPHS, Steps, runs_ahead
from peerlm.train.checkpoint import TrainState, list_checkpoints
from peerlm.train.config import TrainConfig
from peerlm.train.disturbance import OtherPrograms
from peerlm.train.measures import Measures
from peerlm.train.runlog import Display, RunLog
from peerlm.train.saving import Saver
from peerlm.train.space import check_space
from peerlm.train.step import autocast


@dataclass(kw_only=True)
class Training:
    """What the steps of a run train, and with what; where the run stands is a `TrainState`, passed in and returned."""

    config: TrainConfig
    """Its run is the folder that is written to; [data] names no folder where `windows` come from elsewhere."""
    ranks: Ranks
    windows: TokenWindows
    """Text to learn from."""
    model: nn.Module
    """What is trained."""
    weights: PreTrainedModel
    """What a checkpoint holds, by its `save_pretrained`: the model, or as much of it as is trained."""
    tokenizer: PreTrainedTokenizerBase | None
    """What a checkpoint holds besides; None: nothing."""
    optimizer: torch.optim.Optimizer
    forward: nn.Module = field(init=False)
    """What a step calls: the model, or what wraps it."""
    steps: Steps = field(init=False)
    """What makes the steps."""
    measures: Measures = field(init=False)
    """What they have measured."""
    flops_per_step: float
    """Over all ranks."""
    budget: Budget
    hooks: Sequence["Hook"] = ()
    stage: str | None = None
    """What messages call the text, where it is one of several."""
    lower_rate: str = "start another run with a lower optim.learning_rate"
    """What to do where the loss is not finite."""
    display: Display = field(default_factory=lambda: Display(Path(), wanted=False))
    others: OtherPrograms = field(default_factory=OtherPrograms)
    """How busy the machine is besides."""
    log: RunLog | None = None
    """Rows of the run; None on other ranks than 0, and outside of `reporting`."""
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.config.checkpoint, self.ranks)
        self.measures = Measures(self.ranks.device)
        if self.runs_ahead:
            keep_learning_rates_on(self.ranks.device, self.optimizer)
        self.wrap()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of new text, over all ranks."""
        return self.config.data.batch_size * self.config.data.context

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are asked for before those before them are done, and what they measure is read later."""
        return runs_ahead(self.ranks.device)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of forward passes, by the configured precision."""
        return autocast(self.config.precision, self.ranks.device.type)

    def check_space(self, *, progress: bool) -> None:
        """Raise UserError, or say, where the disk has no room for the checkpoints to come; see `peerlm.train.space`."""
        coming = self.config.checkpoint.keep + 1 - len(list_checkpoints(self.folder))
        display = Display(self.folder, wanted=progress and self.ranks.is_main)
        check_space(self.folder, self.optimizer, checkpoints=max(1, coming), warn=display.note)

    @contextmanager
    def reporting(self, state: TrainState, *, progress: bool) -> Iterator[None]:
        """Within this context rows are logged, after those that `state` has, and `progress` is shown if wanted."""
        with ExitStack() as stack:
            if self.ranks.is_main:
                tensorboard = self.config.log.tensorboard
                log = RunLog(self.folder, tensorboard=tensorboard, log_bytes=state.log_bytes, step=state.step)
                self.log = stack.enter_context(closing(log))
            self.display = stack.enter_context(Display(self.folder, wanted=progress and self.ranks.is_main))
            yield

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log; only rank 0 has one."""
        if self.log is not None:
            self.log.write(row)

    def wrap(self) -> None:
        """Let steps exchange gradients between ranks, and be compiled if asked; again where parameters are others."""
        self.unwrap()
        sharded = self.config.parallel.sharded
        if sharded:
            exchange_gradients(self.model)
        elif self.ranks.world_size > 1:
            share_statistics(self.model, dist.group.WORLD)
            self.forward = DistributedDataParallel(self.model, forward_sync_buffers=False)
        if self.config.compile and sharded:
            compile_dense(self.model)
        elif self.config.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        known = self.steps.obstacle if hasattr(self, "steps") else self._obstacle_to_graphs()
        self.steps = Steps(self.ranks.device, self.optimizer, known)

    def _obstacle_to_graphs(self) -> str:
        """Why no step of this run is captured in a graph, as far as can be known before; empty where nothing is."""
        config, device = self.config, self.ranks.device
        if config.graph == "off":
            return "graph = 'off'"
        if device.type not in GRAPHS:
            return f"the run is on device {device}, and a graph is one of CUDA's"
        if config.optim.matrices == "muon":
            return "optim.matrices = 'muon' takes its learning rate from the host"
        if self.ranks.world_size > 1 or config.parallel.sharded:
            return f"{self.ranks.world_size} processes exchange tokens or gradients in each step"
        if config.tables.folder:
            return f"tables.folder = {config.tables.folder!r}: the host fetches rows of tables in each step"
        return "compile = true" if config.compile else ""

    def unwrap(self) -> None:
        """Drop what exchanges gradients while the processes are still joined: it can hang afterwards."""
        exchanged = self.ranks.world_size > 1
        self.forward = self.model
        share_statistics(self.model, None)
        if exchanged:
            gc.collect()


class Role(Enum):
    """What a hook has to do with the forward and backward passes of a step."""

    NONE = "none"
    LOOKS = "looks"
    """Its `watching` and `after_backward` change nothing: the latter may come after the step."""
    DECIDES = "decides"
    """Python is needed within the step, which so cannot be the replay of a graph."""


class Hook:
    """What happens around the steps of a training besides them; this one does nothing.

    At each of these points the loop calls all hooks, in their order. What a hook must know after a kill is in the
    `TrainState` that it returns, or is a function of it.
    """

    def before_loading(self, training: Training, state: TrainState) -> None:
        """Give model and optimizer the shapes that they have in the checkpoint of `state`, which is loaded next."""

    def before_step(self, training: Training, state: TrainState, progress: float) -> TrainState:
        """Before each step; `progress` is the share of the budget that is spent after it."""
        return state

    def batch(self, training: Training, state: TrainState, input_ids_BT: Tensor) -> Tensor:
        """What the step reads in place of this batch: (B, T) int64, windows of new text first."""
        return input_ids_BT

    def role(self, training: Training, state: TrainState) -> Role:
        """What `watching` and `after_backward` do in this step; by default, where there are any, they may do anything.

        Steps in which all hooks have the same roles may be replays of one graph.
        """
        silent = type(self).watching is Hook.watching and type(self).after_backward is Hook.after_backward
        return Role.NONE if silent else Role.DECIDES

    def watching(self, training: Training, state: TrainState) -> AbstractContextManager[Any]:
        """The context of the forward and backward passes over the batch, with the model in training mode."""
        return nullcontext()

    def after_backward(self, training: Training, state: TrainState, seen: Any) -> dict[str, Any]:
        """Add to gradients or restrict them, before they are clipped; returns what joins the row of the log.

        `seen` is what `watching` gave. A number on a device, (), is read when the row is written; one that is not
        finite stops the run.
        """
        return {}

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """After each step, when its row is written; `done` says whether it was the last."""
        return state

    def before_checkpoint(self, training: Training) -> None:
        """Before a checkpoint that a resumed run makes at the same step: one due by steps, or at the end.

        What this does to weights is then the same in both; nothing is done before one due by time or by a signal.
        """


def place(state: TrainState) -> dict[str, Any]:
    """How far a run is, as each row of its log begins."""
    return {"step": state.step, "tokens": state.tokens, "flops": state.flops, "seconds": state.seconds}
