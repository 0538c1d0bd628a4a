"""The training run: build, step until the budget is spent, evaluate, save."""

import gc
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peerlm.accounting import model_cost
from peerlm.data import Batch, batches, load_tokenizer
from peerlm.errors import TrainingStopped, UserError
from peerlm.evaluate import held_out_loss
from peerlm.files import atomic_folder, is_disk_full, write_json
from peerlm.growth import grow, set_opening
from peerlm.growth.freezing import Frozen
from peerlm.optim import RowAdamW, clip_gradients, cosine, set_learning_rates, wsd
from peerlm.ranks import Ranks, join_ranks
from peerlm.train.budget import Budget
from peerlm.train.build import build_model, build_optimizer, open_data, wrap_forward
from peerlm.train.card import model_card
from peerlm.train.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint, save_model
from peerlm.train.config import OptimConfig, TrainConfig
from peerlm.train.growth import check_growths, flops_after, grow_once, hold_still, opening_at, read_growths
from peerlm.train.interrupts import Interrupts
from peerlm.train.run_folder import check_run, last_good, open_run
from peerlm.train.runlog import Display, RunLog
from peerlm.train.step import accumulate_gradients
from peerlm.usage import ExpertUsage, record_usage


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    run: Path
    """The run's folder; the trained model is in its `model/`."""
    summary: dict[str, Any]
    """What `summary.json` holds."""


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Train by `config` into the folder `config.run`, until the budget is spent.

    The run folder gets config.json (resolved), log.jsonl (rows with loss, or with validation_loss),
    checkpoints/, model/ (for `from_pretrained`) and summary.json. With `resume` a run goes on from its
    newest checkpoint, or from the start where there is none yet; however it was ended, its weights become
    bit for bit those of a run never interrupted, given the same number of threads and a budget other than
    minutes. Resuming a finished run returns its summary.

    Args:
        config: the run; `load_recipe` reads one from a file.
        resume: whether `config.run` is a run to go on with; otherwise it must not exist or be empty.
        progress: whether to show a bar (on a terminal) or lines (elsewhere) on stderr.

    Raises:
        UserError: a setting, the data, the run folder or a checkpoint that cannot be used; a full disk.
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.
    """
    run = Path(config.run)
    try:
        with join_ranks(config.device) as ranks:
            check_run(config, resume=resume)
            ranks.wait()
            if (run / "summary.json").is_file():
                return TrainResult(run=run, summary=json.loads((run / "summary.json").read_text()))
            trainer = Trainer(config, ranks, progress=progress)
            try:
                return TrainResult(run=run, summary=trainer.train())
            finally:
                trainer.unwrap()
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"the disk of {run} is full: free some space, then --resume; {last_good(run)}") from error
        raise


def learning_rate(config: OptimConfig, progress: float) -> float:
    """The scheduled learning rate at a share `progress` of the budget."""
    if config.schedule == "cosine":
        factor = cosine(progress, warmup=config.warmup, final=config.final)
    else:
        factor = wsd(progress, warmup=config.warmup, decay=config.decay, final=config.final)
    return config.learning_rate * factor


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch for one step of one rank, so that dropout, too, is a pure function of the step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


class Trainer:
    """What a run is made of and what it does; where it stands is a `TrainState`, passed in and returned."""

    def __init__(self, config: TrainConfig, ranks: Ranks, *, progress: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.run = Path(config.run)
        self.display = Display(self.run, wanted=progress and ranks.is_main)
        self.log: RunLog | None = None
        if config.data.batch_size % ranks.world_size:
            raise UserError(
                f"data.batch_size = {config.data.batch_size} is not divisible by the {ranks.world_size} "
                "processes that train: choose a multiple"
            )
        self.rank_batch_size = config.data.batch_size // ranks.world_size
        self.windows, self.heldout = open_data(config.data, ranks, progress=progress)
        self.tokenizer = load_tokenizer(config.data.folder)
        self.model = build_model(config, self.windows.shards, ranks.device)
        self.growths = read_growths(config.grow)
        if self.growths:
            check_growths(self.model, self.growths)
        self.frozen: Frozen | None = None
        self.cost = model_cost(self.model, config.data.context)
        self.optimizer = build_optimizer(self.model, config, ranks)
        self.forward = wrap_forward(self.model, config, ranks)
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        if config.precision == "bf16":
            self.autocast = partial(torch.autocast, ranks.device.type, dtype=torch.bfloat16)
        self.tokens_per_step = config.data.batch_size * config.data.context
        self.budget = Budget.plan(
            config.budget,
            tokens_per_step=self.tokens_per_step,
            flops_per_token=[
                self.cost.training_flops_per_token,
                *flops_after(self.model, self.growths, config.data.context),
            ],
            shares=[growth.share for growth in self.growths],
        )

    def train(self) -> dict[str, Any]:
        """From the newest checkpoint, or the start, to the end; returns the summary."""
        if self.ranks.is_main:
            open_run(self.config)
        self.ranks.wait()
        checkpoints = list_checkpoints(self.run)
        state = TrainState()
        if checkpoints:
            state = load_checkpoint(checkpoints[-1], self.model, self.optimizer, self.grow_again)
            self.adapt_to_growth()
        with ExitStack() as stack:
            stack.enter_context(self.display)
            if self.ranks.is_main:
                tensorboard = self.config.log.tensorboard
                log = RunLog(self.run, tensorboard=tensorboard, log_bytes=state.log_bytes, step=state.step)
                self.log = stack.enter_context(closing(log))
            with Interrupts() as interrupts:
                state = self.fit(state, interrupts)
            state, evaluation = self.evaluate(state, self.config.eval.final_windows)
            summary = self.summarise(state, evaluation)
            if self.ranks.is_main:
                with atomic_folder(self.run / "model") as folder:
                    save_model(folder, self.model, self.tokenizer)
                    model_card(self.config, self.model, summary).save(folder / "README.md")
                write_json(self.run / "summary.json", summary)
        self.ranks.wait()
        return summary

    def fit(self, state: TrainState, interrupts: Interrupts) -> TrainState:
        """Take steps until the budget is spent, with log, evaluations and checkpoints when they are due."""
        every = {name: getattr(self.config, name).every for name in ("log", "eval", "checkpoint")}
        stream = batches(
            self.windows,
            batch_size=self.rank_batch_size,
            seed=self.config.seed,
            position=state.position,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            workers=self.config.data.workers,
        )
        done = self.budget.reached(state.step, state.seconds)
        while not done:
            while state.growths < self.budget.changes_due(state.step, state.seconds):
                state = self.grow(state)
            logged = (state.step + 1) % every["log"] == 0
            state, row = self.step(state, stream, sample_usage=logged and not self.config.compile)
            done = self.budget.reached(state.step, state.seconds)
            if done:
                state = self.open(state, 1.0)  # the last step of a budget of minutes may take longer than foreseen
            if logged or done:
                state = self.log_interval(state, row)
            if every["eval"] and state.step % every["eval"] == 0 and not done:
                state, _ = self.evaluate(state, self.config.eval.windows)
            stop = self.ranks.any(interrupts.received is not None) and not done
            due = done or bool(every["checkpoint"] and state.step % every["checkpoint"] == 0)
            if due and isinstance(self.optimizer, RowAdamW):
                self.optimizer.catch_up()  # not when told to stop: a resumed run must do the same at the same steps
            if stop or due:
                state = self.save(state)
            if stop:
                raise self.stopped_by_signal(state, interrupts)
        return state

    def step(
        self, state: TrainState, stream: Iterator[Batch], *, sample_usage: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take one optimizer step; returns the state after it and what it measured."""
        config = self.config
        started, cpu_started = time.perf_counter(), time.process_time()
        progress = self.budget.next_progress(state.step, state.seconds)
        state = self.open(state, progress)
        rate = learning_rate(config.optim, progress)
        groups = self.optimizer.param_groups
        set_learning_rates(groups, rate, progress=progress, table_lr_decay=config.optim.table_lr_decay)
        seed_step(config.seed, state.step, self.ranks.rank)
        input_ids_BT = next(stream)["input_ids"].to(self.ranks.device)
        self.model.train()
        usage: dict[str, ExpertUsage] = {}
        with ExitStack() as stack:
            if sample_usage:
                usage = stack.enter_context(record_usage(self.model))
            loss = self.ranks.mean(
                accumulate_gradients(
                    self.forward,
                    input_ids_BT,
                    micro_batch_size=config.data.micro_batch_size or self.rank_batch_size,
                    autocast=self.autocast,
                )
            )
        norms = clip_gradients(groups, max_norm=config.optim.clip, table_max_norm=config.optim.table_clip)
        self.require_finite(
            state, rate, {"loss": loss, "gradient norm": norms.rest, "table gradient norm": norms.table}
        )
        self.optimizer.step()
        seconds = self.ranks.of_main(time.perf_counter() - started)
        state = replace(
            state,
            step=state.step + 1,
            position=state.position + config.data.batch_size,
            tokens=state.tokens + self.tokens_per_step,
            flops=state.flops + self.tokens_per_step * self.cost.training_flops_per_token,
            seconds=state.seconds + seconds,
            cpu_seconds=state.cpu_seconds + time.process_time() - cpu_started,
            interval_loss=state.interval_loss + loss,
            interval_steps=state.interval_steps + 1,
            interval_seconds=state.interval_seconds + seconds,
        )
        self.display.step(
            step=state.step,
            progress=self.budget.progress(state.step, state.seconds),
            loss=state.interval_loss / state.interval_steps,
            tokens_per_second=self.tokens_per_step * state.interval_steps / state.interval_seconds,
        )
        measured = {"lr": rate, "grad_norm": norms.rest, "table_grad_norm": norms.table}
        return state, {**measured, "usage": _summed_usage(usage)}

    def grow(self, state: TrainState) -> TrainState:
        """Let the layers grow, closed; what new keys are chosen by is what the next steps will read."""
        growth = self.growths[state.growths]
        state = self.open(state, growth.share)  # a budget of minutes may pass two shares in one step
        coming = batches(self.windows, batch_size=8, seed=self.config.seed, position=state.position)
        samples = ({"input_ids": batch["input_ids"]} for batch in islice(coming, 8))
        if self.frozen is not None:
            self.frozen.remove()
        self.frozen = grow_once(
            self.model,
            growth,
            self.config.grow,
            optimizer=self.optimizer,
            samples=samples,
            seed=self.config.seed + 1 + state.growths,
        )
        self.adapt_to_growth()
        self.write({**_place(state), "grown_to": growth.sub_keys**2})
        self.display.note(f"step {state.step}  grown to {growth.sub_keys**2:,} experts")
        return replace(state, growths=state.growths + 1, opening=0.0)

    def grow_again(self, state: TrainState) -> None:
        """Give a new model and its optimizer the shapes that those of a checkpoint have."""
        for number, growth in enumerate(self.growths[: state.growths], start=1):
            grow(self.model, growth.sub_keys**2, optimizer=self.optimizer)
            if number == state.growths:
                self.frozen = hold_still(self.model, self.config.grow, self.optimizer)
            if number < state.growths or state.opening == 1:
                set_opening(self.model, 1)

    def adapt_to_growth(self) -> None:
        """Wrap the model anew, whose parameters are others now, and count what it costs."""
        self.unwrap()
        self.forward = wrap_forward(self.model, self.config, self.ranks)
        self.cost = model_cost(self.model, self.config.data.context)

    def unwrap(self) -> None:
        """Let what exchanges gradients end while the processes are joined: it waits for them, sometimes for ever."""
        self.forward = self.model
        gc.collect()

    def open(self, state: TrainState, progress: float) -> TrainState:
        """Let new experts in as far as they should be at this share of the budget."""
        if state.opening == 1:
            return state
        opening = opening_at(self.config.grow, self.growths, state.growths, progress)
        set_opening(self.model, opening)
        return replace(state, opening=opening)

    def require_finite(self, state: TrainState, rate: float, values: Mapping[str, float]) -> None:
        """Raise TrainingStopped, before the optimizer steps, where a value is NaN or infinite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingStopped(
                    f"training stopped at step {state.step + 1}: the {name} is {value} at learning rate "
                    f"{rate:.3g}; {last_good(self.run)}; start another run with a lower optim.learning_rate",
                    exit_code=3,
                )

    def log_interval(self, state: TrainState, measured: Mapping[str, Any]) -> TrainState:
        """Write the row of the steps since the last one; norms and usage are those of the last step."""
        loss = state.interval_loss / state.interval_steps
        tokens_per_second = self.tokens_per_step * state.interval_steps / state.interval_seconds
        self.write({**_place(state), "loss": loss, "tokens_per_second": tokens_per_second, **measured})
        self.display.row(
            f"step {state.step}  {self.budget.progress(state.step, state.seconds):.1%}  loss {loss:.4f}  "
            f"lr {measured['lr']:.3g}  {tokens_per_second:,.0f} tokens/s"
        )
        return replace(state, train_loss=loss, interval_loss=0.0, interval_steps=0, interval_seconds=0.0)

    def evaluate(self, state: TrainState, windows: int | None) -> tuple[TrainState, dict[str, Any]]:
        """Measure the loss and the use of experts on held-out windows (None: all), and write the row."""
        started = time.perf_counter()
        batch_size = self.config.eval.batch_size
        with self.autocast(), record_usage(self.model) as usage:
            loss = held_out_loss(self.model, self.heldout, batch_size=batch_size, limit=windows)
        evaluation = {"validation_loss": loss, "usage": _summed_usage(usage)}
        self.write({**_place(state), **evaluation})
        self.display.note(f"step {state.step}  validation loss {loss:.4f}  perplexity {math.exp(loss):.2f}")
        seconds = time.perf_counter() - started
        return replace(state, evaluation_seconds=state.evaluation_seconds + seconds), evaluation

    def save(self, state: TrainState) -> TrainState:
        """Write a checkpoint."""
        started = time.perf_counter()
        peak = max(state.peak_memory_bytes, peak_memory_bytes(self.ranks.device))
        state = replace(state, peak_memory_bytes=peak)
        if self.log is not None:
            state = replace(state, log_bytes=self.log.sync())
            keep = self.config.checkpoint.keep
            save_checkpoint(self.run, state, self.model, self.optimizer, self.tokenizer, keep=keep)
        self.ranks.wait()
        return replace(state, checkpoint_seconds=state.checkpoint_seconds + time.perf_counter() - started)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log; only rank 0 has one."""
        if self.log is not None:
            self.log.write(row)

    def stopped_by_signal(self, state: TrainState, interrupts: Interrupts) -> TrainingStopped:
        """The outcome of a run that was told to stop, after its checkpoint."""
        number = interrupts.received or signal.SIGTERM
        return TrainingStopped(
            f"stopped by {number.name} after step {state.step}; {last_good(self.run)}; go on with --resume",
            exit_code=128 + number,
        )

    def summarise(self, state: TrainState, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """What the whole run amounts to."""
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "evaluation_seconds": state.evaluation_seconds,
            "checkpoint_seconds": state.checkpoint_seconds,
            "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory_bytes(self.ranks.device)),
            "total_parameters": self.cost.total_parameters,
            "active_parameters": self.cost.active_parameters,
            "training_flops_per_token": self.cost.training_flops_per_token,
            "train_loss": state.train_loss,
            "perplexity": math.exp(evaluation["validation_loss"]),
            **evaluation,
            "device": str(self.ranks.device),
            "processes": self.ranks.world_size,
            "threads": torch.get_num_threads(),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: on CUDA by tensors, otherwise by this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _place(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "tokens": state.tokens, "flops": state.flops, "seconds": state.seconds}


def _summed_usage(usage: Mapping[str, ExpertUsage]) -> dict[str, dict[str, float]]:
    """Usage and unevenness by layer, over all ranks; each rank must call it."""
    for layer in usage.values():
        layer.merge()
    return {name: {"share": layer.share, "unevenness": layer.unevenness} for name, layer in usage.items()}
