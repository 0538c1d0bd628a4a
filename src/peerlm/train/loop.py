"""The training loop: steps until the budget is spent, with rows of a log and checkpoints; see `Hook` for all else."""

import logging
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlm.data import Batch, batches
from peerlm.errors import TrainingStopped
from peerlm.optim import clip_gradients, learning_rate, set_learning_rates
from peerlm.parallel import since_last
from peerlm.train.captured import own_stream
from peerlm.train.checkpoint import TrainState, list_checkpoints, load_checkpoint
from peerlm.train.config import CheckpointConfig
from peerlm.train.feed import Feed
from peerlm.train.interrupts import Interrupts
from peerlm.train.measures import Unusable
from peerlm.train.run_folder import last_good
from peerlm.train.step import accumulate_gradients
from peerlm.train.training import Role, Training, place
from peerlm.train.watchdog import Watchdog

log = logging.getLogger(__name__)

_NORM, _TABLE_NORM = "gradient norm", "table gradient norm"


def last_state(training: Training) -> TrainState:
    """Load the newest checkpoint into the model and its optimizer; returns where the run stands, or the start."""
    checkpoints = list_checkpoints(training.folder)
    if not checkpoints:
        return TrainState()

    def reshape(state: TrainState) -> None:
        for hook in training.hooks:
            hook.before_loading(training, state)

    return load_checkpoint(checkpoints[-1], training.weights, training.optimizer, reshape, ranks=training.ranks)


def fit(training: Training, state: TrainState) -> TrainState:
    """Take steps until the budget is spent; returns where the run stands then.

    Raises:
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.
    """
    config, ranks, budget, hooks = training.config, training.ranks, training.budget, training.hooks
    stream = batches(
        training.windows,
        batch_size=config.data.batch_size // ranks.world_size,
        seed=config.seed,
        position=state.position,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
    )
    feed = Feed.to(ranks.device, stream)
    training.measures.begin(state.interval_loss)
    _say_obstacle(training)
    done = budget.reached(state.step, state.seconds)
    saved = monotonic()
    watchdog = Watchdog(60 * config.watchdog_minutes, lambda: last_good(training.folder))
    with own_stream(ranks.device), Interrupts() as interrupts, watchdog:
        while not done:
            progress = budget.next_progress(state.step, state.seconds)
            for hook in hooks:
                state = hook.before_step(training, state, progress)
            with watchdog.step():
                state, measured = take_step(training, state, feed, progress)
                done = budget.reached(state.step, state.seconds)
                is_row = done or state.step % config.log.every == 0
                if not done:
                    feed.read_ahead()
                if is_row:
                    state = read_measures(training, state)
                    done = budget.reached(state.step, state.seconds)  # by the clock, not by what was sent ahead
            if is_row or not training.runs_ahead:
                _show(training, state)
            if is_row:
                state = _log_interval(training, state, measured)
            for hook in hooks:
                state = hook.after_step(training, state, done=done)
            stop = ranks.any(interrupts.received is not None) and not done
            planned = done or _due(state.step, config.checkpoint.every)
            if planned:
                for hook in hooks:
                    hook.before_checkpoint(training)
            if stop or planned or ranks.any(_late(monotonic() - saved, config.checkpoint)):
                state, saved = save(training, state), monotonic()
            if stop or done:
                training.saver.wait()
            if stop:
                raise _stopped(training, state, interrupts.received or signal.SIGTERM)
    return state


def take_step(
    training: Training, state: TrainState, stream: Iterator[Batch], progress: float
) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step; returns the state after it and what it measured.

    Args:
        training: what is trained.
        state: where the run stands.
        stream: batches of this rank, of which one is read.
        progress: share of the budget that is spent after the step.

    Raises:
        TrainingStopped: the loss or a gradient is not finite; the optimizer has made no step then. Where the training
            runs ahead, `read_measures` raises it instead, some steps later.
    """
    config, ranks, hooks = training.config, training.ranks, training.hooks
    started, cpu_started = time.perf_counter(), time.process_time()
    training.others.since()
    optim = config.optim
    rate = learning_rate(
        optim.schedule,
        progress,
        peak=optim.learning_rate,
        warmup=optim.warmup,
        decay=optim.decay,
        final=optim.final,
    )
    groups = training.optimizer.param_groups
    set_learning_rates(
        groups,
        rate,
        progress=progress,
        table_lr_decay=optim.table_lr_decay,
        table_warmup=optim.table_warmup,
    )
    training.measures.count_step(state.step + 1, rate)
    seed_step(config.seed, state.step, ranks.rank)
    input_ids_BT = next(stream)["input_ids"]
    for hook in hooks:
        input_ids_BT = hook.batch(training, state, input_ids_BT)
    training.model.train()
    roles = tuple(hook.role(training, state) for hook in hooks)
    seen, added = training.steps.make(
        None if Role.DECIDES in roles else roles,
        input_ids_BT.to(ranks.device),
        lambda input_ids_BT: _train_on(training, state, input_ids_BT, roles),
    )
    for hook, role, what in zip(hooks, roles, seen, strict=True):
        if role is Role.LOOKS:
            added = {**added, **hook.after_backward(training, state, what)}
    seconds = ranks.of_main(time.perf_counter() - started)
    others = training.others.since()
    if ranks.world_size > 1 or config.data.workers or state.other_cpu_seconds is None:
        others = None  # the run's own processes would count as other programs
    state = replace(
        state,
        step=state.step + 1,
        position=state.position + config.data.batch_size,
        tokens=state.tokens + training.tokens_per_step,
        flops=state.flops + training.flops_per_step,
        seconds=state.seconds + seconds,
        cpu_seconds=state.cpu_seconds + time.process_time() - cpu_started,
        other_cpu_seconds=None if others is None else (state.other_cpu_seconds or 0.0) + others,
        interval_steps=state.interval_steps + 1,
        interval_seconds=state.interval_seconds + seconds,
    )
    if not training.runs_ahead:
        state = read_measures(training, state)
    return state, {"lr": rate, **added}


def _train_on(
    training: Training, state: TrainState, input_ids_BT: Tensor, roles: Sequence[Role]
) -> tuple[list[Any], dict[str, Any]]:
    """Forward, backward, clipping and the optimizer's step: all that a graph may hold.

    Returns what each hook has seen, and what those that decide add to the row.
    """
    hooks, optim = training.hooks, training.config.optim
    with ExitStack() as stack:
        seen = [stack.enter_context(hook.watching(training, state)) for hook in hooks]
        loss = training.ranks.mean(
            accumulate_gradients(
                training.forward,
                input_ids_BT,
                micro_batch_size=training.config.data.micro_batch_size or len(input_ids_BT),
                autocast=training.autocast,
            )
        )
    added: dict[str, Any] = {}
    for hook, role, what in zip(hooks, roles, seen, strict=True):
        if role is Role.DECIDES:
            added |= hook.after_backward(training, state, what)
    norms = clip_gradients(training.optimizer.param_groups, max_norm=optim.clip, table_max_norm=optim.table_clip)
    numbers = {"loss": loss, **{name: value for name, value in added.items() if isinstance(value, Tensor)}}
    training.measures.add({**numbers, _NORM: norms.of_rest, _TABLE_NORM: norms.of_tables})
    if not training.runs_ahead:
        _require_finite(training, training.measures.read()[1])
    training.optimizer.step()
    return seen, added


def read_measures(training: Training, state: TrainState) -> TrainState:
    """Wait for what the steps have measured; returns the state with the sum of the interval's losses.

    Where steps are sent ahead of a device, this is where their time is spent, and it is theirs.

    Raises:
        TrainingStopped: since the last time a number was not finite.
    """
    started = time.perf_counter()
    loss_sum, unusable = training.measures.read()
    waited = training.ranks.of_main(time.perf_counter() - started) if training.runs_ahead else 0.0
    _require_finite(training, unusable)
    return replace(
        state,
        interval_loss=loss_sum,
        seconds=state.seconds + waited,
        interval_seconds=state.interval_seconds + waited,
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch for one step of one rank, so that dropout, too, is a pure function of the step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def save(training: Training, state: TrainState) -> TrainState:
    """Write a checkpoint, which changes no weight; raises TrainingStopped where these are not what they should be."""
    state = read_measures(training, state)
    started = time.perf_counter()
    peak = max(state.peak_memory_bytes, peak_memory_bytes(training.ranks.device))
    state = replace(state, peak_memory_bytes=peak)
    with training.ranks.together():
        if training.log is not None:
            state = replace(state, log_bytes=training.log.sync())
    training.saver.save(training.folder, state, training.weights, training.optimizer, training.tokenizer)
    return replace(state, checkpoint_seconds=state.checkpoint_seconds + time.perf_counter() - started)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: on CUDA by tensors, otherwise by this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _late(seconds: float, config: CheckpointConfig) -> bool:
    """Whether a checkpoint is due that long after the last one, or after the start."""
    return config.minutes > 0 and seconds >= 60 * config.minutes


def _interval(training: Training, state: TrainState) -> tuple[float, float]:
    """Mean loss and tokens per second since the last row."""
    speed = training.tokens_per_step * state.interval_steps / state.interval_seconds
    return state.interval_loss / state.interval_steps, speed


def _show(training: Training, state: TrainState) -> None:
    loss, tokens_per_second = _interval(training, state)
    progress = training.budget.progress(state.step, state.seconds)
    training.display.step(step=state.step, progress=progress, loss=loss, tokens_per_second=tokens_per_second)


def _log_interval(training: Training, state: TrainState, measured: Mapping[str, Any]) -> TrainState:
    """Write the row of the steps since the last one; what was measured is of the last step."""
    loss, tokens_per_second = _interval(training, state)
    newest = training.measures.newest
    norms = {"grad_norm": newest[_NORM], "table_grad_norm": newest[_TABLE_NORM]}
    found = {name: newest[name] if isinstance(value, Tensor) else value for name, value in measured.items()}
    row = {"loss": loss, "tokens_per_second": tokens_per_second, "lr": measured["lr"], **norms}
    if training.config.parallel.sharded:
        tokens = training.tokens_per_step * state.interval_steps / training.ranks.world_size
        row |= since_last(training.model, tokens)
    training.write({**place(state), **row, **found})
    training.display.row(
        f"step {state.step}  {training.budget.progress(state.step, state.seconds):.1%}  loss {loss:.4f}  "
        f"lr {measured['lr']:.3g}  {tokens_per_second:,.0f} tokens/s"
    )
    training.measures.begin()
    return replace(state, train_loss=loss, interval_loss=0.0, interval_steps=0, interval_seconds=0.0)


def _require_finite(training: Training, unusable: Unusable | None) -> None:
    if unusable is not None:
        doing = f"learning {training.stage}" if training.stage else "training"
        raise TrainingStopped(
            f"{doing} stopped at step {unusable.step}: the {unusable.name} is {unusable.value} at learning rate "
            f"{unusable.learning_rate:.3g}; {last_good(training.folder)}; {training.lower_rate}",
            exit_code=3,
        )


def _say_obstacle(training: Training) -> None:
    """Say why steps are not captured in graphs, where one could expect them to be."""
    if training.steps.obstacle and (
        training.config.graph == "on" or (training.config.graph == "auto" and training.runs_ahead)
    ):
        log.warning("steps are not captured in graphs, and so are slower: %s", training.steps.obstacle)


def _stopped(training: Training, state: TrainState, number: signal.Signals) -> TrainingStopped:
    """The outcome of a run that was told to stop, after its checkpoint."""
    of = f" of {training.stage}" if training.stage else ""
    return TrainingStopped(
        f"stopped by {number.name} after step {state.step}{of}; {last_good(training.folder)}",
        exit_code=128 + number,
    )
