"""One stage of a stream: the training loop on its text, with the method and what preserves earlier knowledge."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peerlm.accounting import model_cost
from peerlm.continual.checkpoint import TrainedWeights
from peerlm.continual.config import RetentionConfig
from peerlm.continual.cost import training_flops_per_token
from peerlm.continual.method import Method, Stage
from peerlm.continual.retention import Divergence, Replay
from peerlm.continual.text import Text
from peerlm.optim import RowAdamW
from peerlm.ranks import Ranks
from peerlm.train.budget import Budget
from peerlm.train.build import build_optimizer
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import TrainConfig
from peerlm.train.loop import fit, last_state, peak_memory_bytes
from peerlm.train.precision import attention_by_products
from peerlm.train.training import Hook, Training
from peerlm.usage import ExpertUsage


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """All that the steps of a stage need."""

    config: TrainConfig
    """Its run is the stage's folder; its data's folder is not used."""
    retention: RetentionConfig
    method: Method
    stage: Stage
    model: nn.Module
    """What is trained, as `Method.prepare` gave it."""
    before: PreTrainedModel | None
    """The model before the stage, where the divergence from it counts."""
    text: Text


class ByMethod(Hook):
    """Trains what the method of a lesson trains, in the mode that it asks for."""

    def __init__(self, method: Method, stage: Stage) -> None:
        self.method, self.stage = method, stage

    @contextmanager
    def watching(self, training: Training, state: TrainState) -> Iterator[Mapping[str, ExpertUsage]]:
        """Watch as the method does."""
        self.method.train_mode(training.model)
        with self.method.watching(training.model) as usage:
            yield usage

    def after_backward(self, training: Training, state: TrainState, seen: Any) -> dict[str, Any]:
        """Drop gradients of what the method freezes in this step."""
        self.method.restrict(training.model, self.stage, seen, state.step)
        return {}


def learn_stage(lesson: Lesson, ranks: Ranks, *, progress: bool) -> dict[str, Any]:
    """Train by a lesson from its newest checkpoint, or from the start, to its end; returns what that took.

    Raises:
        UserError: the budget does not suffice for one step, or the disk for one checkpoint.
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.
    """
    training = _training(lesson, ranks)
    training.check_space(progress=progress)
    state = last_state(training)
    bf16 = lesson.config.precision == "bf16"
    with (
        training.reporting(state, progress=progress),
        attention_by_products(training.model) if bf16 else nullcontext(),
    ):
        state = fit(training, state)
    if isinstance(training.optimizer, RowAdamW):
        training.optimizer.catch_up()
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "trained_parameters": sum(parameter.numel() for parameter in training.weights.parameters()),
        "train_loss": state.train_loss,
        "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory_bytes(ranks.device)),
    }


def _training(lesson: Lesson, ranks: Ranks) -> Training:
    config, retention, earlier = lesson.config, lesson.retention, lesson.stage.earlier
    context, batch_size = config.data.context, config.data.batch_size
    replay_per_step = retention.replay * batch_size
    windows_per_step = batch_size + replay_per_step
    before_flops = 0.0
    hooks: list[Hook] = []
    if earlier is not None:
        hooks.append(Replay(earlier, replay_per_step))
        if lesson.before is not None:
            hooks.append(Divergence(lesson.before, earlier, weight=retention.kl, windows=retention.kl_windows))
            windows_per_step += retention.kl_windows
            before_flops = model_cost(lesson.before, context).forward_flops_per_token * context * retention.kl_windows
    hooks.append(ByMethod(lesson.method, lesson.stage))  # last, for it drops gradients of the divergence, too
    flops_per_step = training_flops_per_token(lesson.model, context) * context * windows_per_step + before_flops
    tokens_per_step = batch_size * context
    return Training(
        config=config,
        ranks=ranks,
        windows=lesson.text.train,
        model=lesson.model,
        weights=TrainedWeights(lesson.model),  # type: ignore[arg-type]  # it saves itself as a model does
        tokenizer=None,
        optimizer=build_optimizer(lesson.model, config, ranks),
        flops_per_step=flops_per_step,
        budget=Budget.plan(
            config.budget, tokens_per_step=tokens_per_step, flops_per_token=[flops_per_step / tokens_per_step]
        ),
        hooks=hooks,
        stage=lesson.stage.name,
        lower_rate="start again with a lower --learning-rate",
    )
