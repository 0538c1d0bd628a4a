"""One stage: steps until its budget is spent, with checkpoints, so that a stage killed at any moment resumes."""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peerlm.accounting import model_cost
from peerlm.continual.checkpoint import TrainedWeights
from peerlm.continual.config import MemoryConfig
from peerlm.continual.cost import training_flops_per_token
from peerlm.continual.memory import divergence, replayed
from peerlm.continual.method import Method, Stage
from peerlm.continual.text import Text
from peerlm.data import batches
from peerlm.errors import TrainingStopped
from peerlm.optim import clip_gradients, set_learning_rates
from peerlm.ranks import Ranks
from peerlm.train.budget import Budget
from peerlm.train.build import build_optimizer
from peerlm.train.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from peerlm.train.config import TrainConfig
from peerlm.train.interrupts import Interrupts
from peerlm.train.run_folder import last_good
from peerlm.train.runlog import Display, RunLog
from peerlm.train.step import accumulate_gradients
from peerlm.train.trainer import learning_rate, seed_step

LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """All that the steps of a stage need."""

    config: TrainConfig
    """Its run is the stage's folder; its data's folder is not used."""
    memory_config: MemoryConfig
    method: Method
    stage: Stage
    model: nn.Module
    """What is trained, as `Method.prepare` gave it."""
    before: PreTrainedModel | None
    """The model before the stage, where the divergence from it counts."""
    text: Text


def learn_stage(lesson: Lesson, ranks: Ranks, *, progress: bool) -> dict[str, Any]:
    """Train by a lesson from its newest checkpoint, or from the start, to its end; returns what that took.

    Raises:
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.
    """
    return _Loop(lesson, ranks, progress=progress).run()


class _Loop:
    def __init__(self, lesson: Lesson, ranks: Ranks, *, progress: bool) -> None:
        self.lesson, self.config, self.ranks, self.progress = lesson, lesson.config, ranks, progress
        self.weights = TrainedWeights(lesson.model)
        self.optimizer = build_optimizer(lesson.model, lesson.config, ranks)
        context, batch_size = self.config.data.context, self.config.data.batch_size
        remembered = lesson.memory_config
        self.replay_per_step = remembered.replay * batch_size
        self.flops_per_step = (
            training_flops_per_token(lesson.model, context)
            * context
            * (batch_size + self.replay_per_step + (remembered.kl_windows if lesson.before is not None else 0))
        )
        if lesson.before is not None:
            reading = model_cost(lesson.before, context).forward_flops_per_token
            self.flops_per_step += reading * context * remembered.kl_windows
        self.tokens_per_step = batch_size * context
        self.budget = Budget.plan(
            self.config.budget,
            tokens_per_step=self.tokens_per_step,
            flops_per_token=[self.flops_per_step / self.tokens_per_step],
        )

    def run(self) -> dict[str, Any]:
        """All steps; see `learn_stage`."""
        folder = self.lesson.stage.folder
        checkpoints = list_checkpoints(folder)
        state = load_checkpoint(checkpoints[-1], self.weights, self.optimizer) if checkpoints else TrainState()
        stream = batches(
            self.lesson.text.train,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            position=state.position,
        )
        log = RunLog(folder, tensorboard=False, log_bytes=state.log_bytes, step=state.step)
        with Display(folder, wanted=self.progress) as display, closing(log), Interrupts() as interrupts:
            while not self.budget.reached(state.step, state.seconds):
                state, row = self.step(state, next(stream)["input_ids"])
                done = self.budget.reached(state.step, state.seconds)
                mean = state.interval_loss / state.interval_steps
                speed = self.tokens_per_step * state.interval_steps / state.interval_seconds
                spent = self.budget.progress(state.step, state.seconds)
                display.step(step=state.step, progress=spent, loss=mean, tokens_per_second=speed)
                if done or state.step % LOG_EVERY == 0:
                    log.write({"step": state.step, "loss": mean, "tokens_per_second": speed, **row})
                    display.row(f"step {state.step}  {spent:.1%}  loss {mean:.4f}  {speed:,.0f} tokens/s")
                    state = replace(state, train_loss=mean, interval_loss=0.0, interval_steps=0, interval_seconds=0.0)
                every = self.config.checkpoint.every
                stop = interrupts.received is not None and not done
                if stop or done or (every and state.step % every == 0):
                    state = replace(state, log_bytes=log.sync())
                    save_checkpoint(folder, state, self.weights, self.optimizer, None, keep=1)  # type: ignore[arg-type]
                if stop and interrupts.received is not None:
                    number = interrupts.received
                    raise TrainingStopped(
                        f"stopped by {number.name} after step {state.step} of {self.lesson.stage.name}; "
                        f"{last_good(folder)}; go on with --resume",
                        exit_code=128 + number,
                    )
        catch_up = getattr(self.optimizer, "catch_up", None)
        if catch_up is not None:
            catch_up()
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": state.seconds,
            "trained_parameters": sum(p.numel() for p in self.weights.parameters()),
            "train_loss": state.train_loss,
        }

    def step(self, state: TrainState, input_ids: torch.Tensor) -> tuple[TrainState, dict[str, Any]]:
        """One step; the state after it, and what it measured."""
        started = time.perf_counter()
        lesson, optim, number = self.lesson, self.config.optim, state.step
        model, memory, remembered = lesson.model, lesson.stage.memory, lesson.memory_config
        progress = self.budget.next_progress(number, state.seconds)
        rate = learning_rate(optim, progress)
        groups = self.optimizer.param_groups
        set_learning_rates(groups, rate, progress=progress, table_lr_decay=optim.table_lr_decay)
        seed_step(self.config.seed, number, 0)
        lesson.method.train_mode(model)
        if memory is not None and (again := replayed(number, self.replay_per_step))[1] > again[0]:
            input_ids = torch.cat([input_ids, memory.draw(*again)])
        input_ids = input_ids.to(self.ranks.device)
        with lesson.method.watching(model) as usage:
            loss = accumulate_gradients(model, input_ids, micro_batch_size=len(input_ids)).item()
        row: dict[str, Any] = {"lr": rate}
        if lesson.before is not None and memory is not None:
            first = number * remembered.kl_windows
            compared = memory.draw(first, first + remembered.kl_windows).to(self.ranks.device)
            away = divergence(model, lesson.before, compared)
            (remembered.kl * away).backward()
            row["divergence"] = away.item()
        lesson.method.restrict(model, lesson.stage, usage)
        norms = clip_gradients(groups, max_norm=optim.clip, table_max_norm=optim.table_clip)
        self._require_finite(number, rate, {"loss": loss, "divergence": row.get("divergence", 0.0)}, norms.finite)
        self.optimizer.step()
        seconds = time.perf_counter() - started
        return replace(
            state,
            step=number + 1,
            position=state.position + self.config.data.batch_size,
            tokens=state.tokens + self.tokens_per_step,
            flops=state.flops + self.flops_per_step,
            seconds=state.seconds + seconds,
            interval_loss=state.interval_loss + loss,
            interval_steps=state.interval_steps + 1,
            interval_seconds=state.interval_seconds + seconds,
        ), row

    def _require_finite(self, step: int, rate: float, values: Mapping[str, float], gradients: bool) -> None:
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not gradients:
            wrong.append("a gradient is not finite")
        if wrong:
            raise TrainingStopped(
                f"learning {self.lesson.stage.name} stopped at step {step + 1}: {wrong[0]} at learning rate "
                f"{rate:.3g}; {last_good(self.lesson.stage.folder)}; start again with a lower --learning-rate",
                exit_code=3,
            )
