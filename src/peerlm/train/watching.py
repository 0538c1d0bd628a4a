"""What a training run measures on the way, as hooks: held-out loss, use of experts, rows brought up to date."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peerlm.data import TokenWindows
from peerlm.evaluate import CopyCounts, copy_probe, held_out_loss
from peerlm.evaluate.copying import check_length
from peerlm.evaluate.likelihood import exp
from peerlm.optim import RowAdamW
from peerlm.ranks import Ranks
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import EvalConfig
from peerlm.train.training import Hook, Role, Training, place
from peerlm.usage import ExpertUsage, record_usage


class Evaluation(Hook):
    """Measures the loss and the use of experts on held-out windows, every so many steps."""

    def __init__(self, heldout: TokenWindows, config: EvalConfig) -> None:
        self.heldout, self.config = heldout, config
        if config.copying:
            check_length(heldout.context, heldout.shards.window_start)

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """Measure where it is due; after the last step more windows are measured on, by `measure`."""
        if self.config.every and state.step % self.config.every == 0 and not done:
            state, _ = self.measure(training, state, self.config.windows)
        return state

    def measure(self, training: Training, state: TrainState, windows: int | None) -> tuple[TrainState, dict[str, Any]]:
        """Measure on that many windows (None: all) and write the row; returns what was measured, too."""
        started = time.perf_counter()
        model: Any = training.model
        reading: dict[str, Any] = {"limit": windows, "ranks": training.ranks}
        copies = None
        if self.config.copying:
            copies = CopyCounts(self.heldout, device=training.ranks.device, **reading)
        with training.autocast(), record_usage(model) as usage:
            loss = held_out_loss(
                model,
                self.heldout,
                batch_size=self.config.batch_size,
                watch=None if copies is None else copies.add,
                **reading,
            )
        found = {"validation_loss": loss, "usage": _summed_usage(usage, training.ranks)}
        if copies is not None:
            with training.autocast():
                probe = copy_probe(model, self.heldout, begin=self.heldout.shards.window_start)
            found["copying"] = {**copies.figures(), **probe}
        training.write({**place(state), **found})
        training.display.note(f"step {state.step}  validation loss {loss:.4f}  perplexity {exp(loss):.2f}")
        seconds = time.perf_counter() - started
        return replace(state, evaluation_seconds=state.evaluation_seconds + seconds), found


class UsageSample(Hook):
    """Measures the use of experts in every so-many-th step; `every` 0: never."""

    def __init__(self, every: int) -> None:
        self.every = every

    def role(self, training: Training, state: TrainState) -> Role:
        """It looks on in the steps that are due."""
        return Role.LOOKS if self._is_due(state) else Role.NONE

    def _is_due(self, state: TrainState) -> bool:
        return self.every > 0 and (state.step + 1) % self.every == 0

    @contextmanager
    def watching(self, training: Training, state: TrainState) -> Iterator[Mapping[str, ExpertUsage]]:
        """Count in the steps that are due."""
        if not self._is_due(state):
            yield {}
            return
        with record_usage(training.model) as usage:
            yield usage

    def after_backward(self, training: Training, state: TrainState, seen: Any) -> dict[str, Any]:
        """Usage and unevenness by layer; empty in other steps."""
        return {"usage": _summed_usage(seen, training.ranks)}


class UpToDateRows(Hook):
    """Brings all rows of tables up to date before checkpoints that are due by steps, and at the end."""

    def before_checkpoint(self, training: Training) -> None:
        """Catch up, where the optimizer leaves rows behind."""
        if isinstance(training.optimizer, RowAdamW):
            training.optimizer.catch_up()


def _summed_usage(usage: Mapping[str, ExpertUsage], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Usage and unevenness by layer, over all ranks; each rank must call it."""
    for layer in usage.values():
        layer.merge(ranks)
    return {name: {"share": layer.share, "unevenness": layer.unevenness} for name, layer in usage.items()}
