"""Seconds per step of a run, by the trainer's own steps on its own text, and how busy the machine was besides."""

import gc
import statistics
import tempfile
from dataclasses import replace
from typing import Any

import torch

from peerlm.data import batches
from peerlm.ranks import join_ranks
from peerlm.train.build import build_training, open_data
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import TrainConfig
from peerlm.train.loop import take_step
from peerlm_studies.rows import machine_and_date


def measure_speed(train: TrainConfig, *, warm_up: int) -> dict[str, Any]:
    """Take the steps of a run, of which nothing is kept, and time those after `warm_up`.

    Seconds are the clock's, since that is what is paid for; `other_cores` says what other programs used meanwhile.

    Returns:
        seconds_per_step, the median; spread, (the middle half of them) over it; other_cores (None where it is not
        known); threads, machine and date.

    Raises:
        UserError: data or a setting that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder, join_ranks(train.device) as ranks:
        config = replace(train, run=folder)
        windows, _ = open_data(config.data, ranks, progress=False)
        training = build_training(config, ranks, windows)
        stream = batches(windows, batch_size=config.data.batch_size, seed=config.seed, position=0)
        state, times = TrainState(), []
        for step in range(int(training.budget.limit)):
            if step == warm_up:
                state = replace(state, seconds=0.0, other_cpu_seconds=0.0)
            before = state.seconds
            state, _ = take_step(training, state, stream, training.budget.next_progress(step, 0.0))
            times.append(state.seconds - before)
    del training
    gc.collect()
    timed = sorted(times[warm_up:])
    median = statistics.median(timed)
    quarter = len(timed) // 4
    others = state.other_cpu_seconds
    row = machine_and_date()
    return {
        "seconds_per_step": median,
        "spread": (timed[-1 - quarter] - timed[quarter]) / median,
        "steps": len(timed),
        "other_cores": None if others is None else max(0.0, others) / state.seconds,
        "threads": torch.get_num_threads(),
        **row,
    }
