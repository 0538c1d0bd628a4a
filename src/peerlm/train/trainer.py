"""The training run: prepare the text, build, take all steps, evaluate, save."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peerlm.accounting import BYTES, model_cost
from peerlm.errors import RankLost, TrainingStopped, UserError
from peerlm.evaluate.likelihood import exp
from peerlm.files import is_disk_full, write_json
from peerlm.ranks import join_ranks
from peerlm.train.build import build_training, open_data
from peerlm.train.card import model_card
from peerlm.train.checkpoint import TrainState, save_model
from peerlm.train.config import TrainConfig
from peerlm.train.loop import fit, last_state, peak_memory_bytes
from peerlm.train.run_folder import Resume, check_run, last_good, open_run
from peerlm.train.tables import close_tables
from peerlm.train.training import Training
from peerlm.train.watching import Evaluation


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    run: Path
    """The run's folder; the trained model is in its `model/`."""
    summary: dict[str, Any]
    """What `summary.json` holds."""


def train(config: TrainConfig, *, resume: Resume = False, progress: bool = True) -> TrainResult:
    """Train by `config` into the folder `config.run`, until the budget is spent.

    The run folder gets config.json (resolved), log.jsonl (rows with loss, or with validation_loss),
    checkpoints/, model/ (for `from_pretrained`) and summary.json. With `resume` a run continues from its
    newest checkpoint, or from the start where there is none yet; its weights become bit for bit those of a run never
    interrupted, given the same number of threads and a budget other than minutes. Resuming a finished run returns its
    summary.

    Args:
        config: the run; `load_recipe` reads one from a file.
        resume: whether `config.run` is a run to resume; otherwise it must not exist or be empty. "auto": resume
            where there is a run, start where there is none.
        progress: whether to show a bar (on a terminal) or lines (elsewhere) on stderr.

    Raises:
        UserError: a setting, the data, the run folder or a checkpoint that cannot be used; a full disk.
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.
    """
    run = Path(config.run)
    try:
        with join_ranks(config.device, always=config.parallel.sharded) as ranks:
            with ranks.together():
                check_run(config, resume=resume)
            if (run / "summary.json").is_file():
                return TrainResult(run=run, summary=json.loads((run / "summary.json").read_text()))
            windows, heldout = open_data(config.data, ranks, progress=progress)
            evaluation = Evaluation(heldout, config.eval)
            training = build_training(config, ranks, windows, evaluation, progress=progress)
            try:
                summary = _run(training, evaluation, progress=progress)
            finally:
                close_tables(training.model)
            training.unwrap()  # not after an exception: it could wait for ranks that have failed
            return TrainResult(run=run, summary=summary)
    except RankLost as error:
        raise TrainingStopped(f"training stopped: {error}; {last_good(run)}", exit_code=error.exit_code) from error
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"the disk of {run} is full: free some space, then --resume; {last_good(run)}") from error
        raise


def _run(training: Training, evaluation: Evaluation, *, progress: bool) -> dict[str, Any]:
    """From the newest checkpoint, or the start, to the end; returns the summary."""
    config, ranks = training.config, training.ranks
    with ranks.together():
        if ranks.is_main:
            training.check_space(progress=progress)
            open_run(config)
    state = last_state(training)
    with training.reporting(state, progress=progress):
        state = fit(training, state)
        state, found = evaluation.measure(training, state, config.eval.final_windows)
        summary = _summary(training, state, found)
        with ranks.atomic_folder(training.folder / "model") as folder:
            save_model(folder, training.weights, training.tokenizer, ranks=ranks)
            with ranks.together():
                if ranks.is_main:
                    model_card(config, training.weights, summary).save(folder / "README.md")
        with ranks.together():
            if ranks.is_main:
                write_json(training.folder / "summary.json", summary)
    return summary


def _summary(training: Training, state: TrainState, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole run amounts to."""
    cost = model_cost(training.model, training.config.data.context)
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "other_cores": None if state.other_cpu_seconds is None else max(0.0, state.other_cpu_seconds) / state.seconds,
        "evaluation_seconds": state.evaluation_seconds,
        "checkpoint_seconds": state.checkpoint_seconds,
        "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory_bytes(training.ranks.device)),
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "training_flops_per_token": cost.training_flops_per_token,
        **{name: getattr(cost, name) for name in BYTES},
        "train_loss": state.train_loss,
        "perplexity": exp(evaluation["validation_loss"]),
        **evaluation,
        "device": str(training.ranks.device),
        "processes": training.ranks.world_size,
        "threads": torch.get_num_threads(),
    }
