"""Writes a run's checkpoints: at once, or while it trains on."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peerlm.ranks import Ranks
from peerlm.train.checkpoint import TrainState, save_checkpoint, save_shards, shards_of
from peerlm.train.config import CheckpointConfig


class Saver:
    """Saves checkpoints of a run, one at a time; each rank must make the same calls.

    With `config.background` a save copies what the rank has and returns. The next one, or `wait`, waits until it is
    written, and raises what went wrong. Its ranks talk in a group of their own.
    """

    def __init__(self, config: CheckpointConfig, ranks: Ranks) -> None:
        self.config, self._ranks = config, ranks
        self._writing: Future[Path] | None = None
        if config.background:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._ranks = replace(ranks, files=ranks.new_files_group())

    def save(
        self,
        run: Path,
        state: TrainState,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Write a checkpoint of these as they are, or begin to; no weight changes."""
        self.wait()
        keep = self.config.keep
        if not self.config.background:
            save_checkpoint(run, state, model, optimizer, tokenizer, keep=keep, ranks=self._ranks)
            return
        shards = shards_of(model, optimizer).staged()
        self._writing = self._thread.submit(save_shards, run, state, shards, tokenizer, keep=keep, ranks=self._ranks)

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
