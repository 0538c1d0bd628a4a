"""Seconds per step of a run, by the trainer's own steps on its own text, and how busy the machine was besides."""

import gc
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from peerlm.ranks import join_ranks
from peerlm.train.build import build_training, open_data
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import TrainConfig
from peerlm.train.disturbance import OtherPrograms
from peerlm.train.loop import fit
from peerlm.train.training import Hook, Training
from peerlm_studies.rows import machine_and_date


class Clock(Hook):
    """Notes the time after each step from `warm_up` on, and what other programs used since.

    Args:
        warm_up: steps before, at least 1.
        last: the step at which the clock stops.
    """

    def __init__(self, *, warm_up: int, last: int) -> None:
        self.warm_up, self.last = warm_up, last
        self.times: list[float] = []
        self.others: float | None = None
        self._programs = OtherPrograms()

    def after_step(self, training: Training, state: TrainState, *, done: bool) -> TrainState:
        """Look at the clock; at either end a GPU is waited for, which otherwise lags behind."""
        if state.step < self.warm_up:
            return state
        if state.step in (self.warm_up, self.last) and training.ranks.device.type == "cuda":
            torch.cuda.synchronize(training.ranks.device)
        self.times.append(time.perf_counter())
        if state.step == self.warm_up:
            self._programs.since()
        if state.step == self.last:
            self.others = self._programs.since()
        return state


def measure_speed(train: TrainConfig, *, warm_up: int) -> dict[str, Any]:
    """Take the steps of a run, of which nothing is kept, and time those after `warm_up`.

    Seconds are the clock's, since that is what is paid for; `other_cores` says what other programs used meanwhile. On a
    GPU, where steps are sent ahead, they are the mean of all, elsewhere the median.

    Returns:
        seconds_per_step; spread, the middle half of steps over it (None on a GPU); other_cores (None where it is not
        known); steps, threads, machine and date.

    Raises:
        UserError: data or a setting that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder, join_ranks(train.device) as ranks:
        config = replace(train, run=folder)
        windows, _ = open_data(config.data, ranks, progress=False)
        assert config.budget.steps is not None  # of `SecondsPlan.timed`
        clock = Clock(warm_up=warm_up, last=config.budget.steps)
        training = build_training(config, ranks, windows, clock)
        try:
            fit(training, TrainState())
        finally:
            training.unwrap()
    on_cpu = ranks.device.type == "cpu"
    del training
    gc.collect()
    times = sorted(later - earlier for earlier, later in pairwise(clock.times))
    whole = clock.times[-1] - clock.times[0]
    seconds, quarter = statistics.median(times) if on_cpu else whole / len(times), len(times) // 4
    return {
        "seconds_per_step": seconds,
        "spread": (times[-1 - quarter] - times[quarter]) / seconds if on_cpu else None,
        "steps": len(times),
        "other_cores": None if clock.others is None else max(0.0, clock.others) / whole,
        "threads": torch.get_num_threads(),
        **machine_and_date(),
    }
