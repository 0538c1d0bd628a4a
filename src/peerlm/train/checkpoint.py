"""Checkpoints: a run's whole state in one folder, complete or absent, checked when read.

RUN/checkpoints/step-00000100/ holds the model as `save_pretrained` writes it, the tokenizer, optimizer.safetensors (see
`peerlm.optim.saved`) and state.json. The latter also records the size and CRC-32 of every other file, and a CRC-32 of
itself. Nothing is unpickled. Rows of tables may be stale in it, where the optimizer updates them when they are next
read: then the model's configuration says so, and `from_pretrained` updates them.

Of a model that is spread over ranks, and where it is asked for, weights and optimizer are in shards instead: each rank
writes what it has (`peerlm.parallel.storage`), and model.json is the configuration. Any number of processes can load
both kinds.

Neither schedules, data order nor dropout have files of their own: each is a pure function of the step and
the seed.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from peerlm.errors import UserError
from peerlm.files import fingerprint, require_space, write_json
from peerlm.names import SHARDED
from peerlm.ops.row_keeping import rows_stay_in_files
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim.saved import load_state, mark_stale, save_state
from peerlm.parallel.export import write_mapped, write_pretrained
from peerlm.parallel.states import (
    is_spread,
    load_states,
    model_entries,
    optimizer_entries,
    reader_of,
    staged,
)
from peerlm.parallel.storage import INDEX, Entries, num_bytes, write_shards
from peerlm.ranks import ALONE, Ranks
from peerlm.train.tables import begin_tables, place_of, prepare_tables, restore_tables

PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, apart from its weights."""

    step: int = 0
    """Optimizer steps taken."""
    position: int = 0
    """Windows read, over all ranks: with the seed, it says which come next."""
    tokens: int = 0
    """Tokens read, over all ranks."""
    flops: float = 0.0
    """Training FLOPs spent, over all ranks."""
    seconds: float = 0.0
    """Wall-clock time of the steps."""
    cpu_seconds: float = 0.0
    """Processor time of the steps on rank 0, over its threads."""
    other_cpu_seconds: float | None = 0.0
    """Processor time of other programs during the steps; None where it is not known."""
    evaluation_seconds: float = 0.0
    """Wall-clock time of the evaluations."""
    checkpoint_seconds: float = 0.0
    """Wall-clock time of writing checkpoints before this one."""
    interval_loss: float = 0.0
    """Sum of the losses since the last row of the log."""
    interval_steps: int = 0
    """Steps since the last row of the log."""
    interval_seconds: float = 0.0
    """Wall-clock time of those steps."""
    train_loss: float | None = None
    """Loss in the last row of the log; None before the first."""
    peak_memory_bytes: int = 0
    """Most memory used so far."""
    growths: int = 0
    """Times that the layers have grown."""
    opening: float = 1.0
    """How far the experts of the last growth are let in."""
    log_bytes: int = 0
    """Length of log.jsonl; a resumed run cuts off what was written later."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob(PREFIX + "*")
    return sorted((folder for folder in folders if _number(folder).isdigit()), key=lambda each: int(_number(each)))


def _number(folder: Path) -> str:
    return folder.name.removeprefix(PREFIX)


def save_checkpoint(
    run: Path,
    state: TrainState,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a complete checkpoint, then remove all but the newest `keep`; returns its folder. Each rank must call it.

    It is there whole or not at all. Where a rank fails to write, all raise.
    """
    if is_spread(model):
        return save_shards(run, state, shards_of(model, optimizer), tokenizer, keep=keep, ranks=ranks)
    folder = checkpoint_folder(run, state.step)
    with ranks.atomic_folder(folder) as partial, ranks.together():
        if ranks.is_main:
            # Stale rows are updated in the resumed run when they would be here.
            with rows_as_they_are(), rows_stay_in_files():
                record = prepare_tables(partial, model)
                _save_whole(partial, model, tokenizer)
                if save_state(optimizer, partial, model):
                    mark_stale(partial)
            _write_state(partial, state, {})
    if ranks.is_main:
        begin_tables(model, record, list_checkpoints(run)[-keep:])
    _remove_old(run, keep, ranks)
    return folder


@dataclass(frozen=True)
class Shards:
    """What one rank writes of a checkpoint in shards."""

    entries: Entries
    values: dict[str, Any]
    """What the optimizer remembers that is no tensor."""
    config: dict[str, Any]
    """The configuration of the model."""

    def staged(self) -> "Shards":
        """A copy, which can be written while steps change the originals."""
        return Shards(staged(self.entries), deepcopy(self.values), deepcopy(self.config))


def shards_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Shards:
    """What this rank has of a model and its optimizer, as it is, sharing their memory."""
    tensors, values = optimizer_entries(model, optimizer)
    return Shards(model_entries(model) | tensors, {"optimizer": values}, model.config.to_dict())


def save_shards(
    run: Path,
    state: TrainState,
    shards: Shards,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    keep: int,
    ranks: Ranks,
) -> Path:
    """As `save_checkpoint`, in shards."""
    folder = checkpoint_folder(run, state.step)
    with ranks.together():
        if ranks.is_main:
            require_space(folder, num_bytes(shards.entries))
    with ranks.atomic_folder(folder) as partial:
        files = write_shards(partial, shards.entries, shards.values, group=ranks.files)
        with ranks.together():
            if ranks.is_main:
                write_json(partial / SHARDED, shards.config)
                if tokenizer is not None:
                    tokenizer.save_pretrained(partial)
                _write_state(partial, state, files)
    _remove_old(run, keep, ranks)
    return folder


def _remove_old(run: Path, keep: int, ranks: Ranks) -> None:
    if ranks.is_main:
        for old in list_checkpoints(run)[:-keep]:
            rmtree(old)


def _write_state(partial: Path, state: TrainState, known: dict[str, dict[str, int]]) -> None:
    """Write state.json; `known` are fingerprints of files, so that these are not read again."""
    names = sorted(path.name for path in partial.iterdir())
    files = {name: known.get(name) or fingerprint(partial / name) for name in names}
    values = {**asdict(state), "files": files}
    write_json(partial / "state.json", {**values, "crc32": _checksum(values)})


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, ranks: Ranks = ALONE
) -> None:
    """Write model and tokenizer for `from_pretrained`, the weights in one file, or those of each sharded table in one.

    Each rank must call it.
    """
    spread = is_spread(model)
    with _quiet():
        if spread:
            write_pretrained(model, folder, ranks=ranks)
        with ranks.together():
            if ranks.is_main and place_of(model) is not None:
                write_mapped(model, folder)
            elif ranks.is_main and not spread:
                model.save_pretrained(folder, max_shard_size="1000TB")
            if ranks.is_main and tokenizer is not None:
                tokenizer.save_pretrained(folder)


def _save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    with _quiet():
        model.save_pretrained(folder, max_shard_size="1000TB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prepare: Callable[[TrainState], object] = lambda state: None,
    *,
    ranks: Ranks = ALONE,
) -> TrainState:
    """Load a checkpoint into `model` and `optimizer`; returns where the run stands. Each rank must call it.

    `prepare` is called before, with that, to give both their shapes. Raises UserError when a file is missing or is not
    as it was written, or was written of another model.
    """
    state = read_state(folder, ranks)
    prepare(state)
    if is_spread(model) or (folder / INDEX).is_file():
        try:
            load_states(model, optimizer, reader_of(folder), group=ranks.files)
        except (ValueError, OSError) as error:
            raise UserError(f"the checkpoint {folder} cannot be loaded: {error}") from error
    else:
        restore_tables(folder, model)
        with rows_stay_in_files():
            load_model(model, folder / "model.safetensors", device=str(next(model.parameters()).device))
            try:
                load_state(optimizer, folder)
            except ValueError as error:
                raise UserError(f"the checkpoint {folder} cannot be loaded: {error}") from error
    return state


def read_state(folder: Path, ranks: Ranks = ALONE) -> TrainState:
    """Check every file of a checkpoint, each on one of the ranks, and return where the run stood."""
    with ranks.together():
        try:
            values = json.loads((folder / "state.json").read_bytes())
            if values.pop("crc32") != _checksum(values):
                raise ValueError("the checksum is not that of the content")
            files = values.pop("files")
            state = TrainState(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(folder, "state.json") from error
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            if not (folder / name).is_file() or fingerprint(folder / name) != files[name]:
                raise _corrupt(folder, name)
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a progress bar of its own."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _corrupt(folder: Path, name: str) -> UserError:
    older = [each for each in list_checkpoints(folder.parents[1]) if int(_number(each)) < int(_number(folder))]
    then = f"the run then resumes from {older[-1].name}" if older else "it starts again, for no older one is left"
    return UserError(
        f"the checkpoint {folder} is damaged ({name} is missing or changed): delete it and --resume again; {then}"
    )


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())
