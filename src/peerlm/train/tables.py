"""A run whose tables are in files: where these are, what that excludes, and how checkpoints name a state of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peerlm.data.progress import progress_bar
from peerlm.errors import UserError
from peerlm.files import write_json
from peerlm.layers.mapped.cached import CACHING, cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in, mapped_tables
from peerlm.layers.table import tables_as
from peerlm.optim.saved import TABLES
from peerlm.train.config import TrainConfig

_WORTH_SHOWING = 1 << 30
"""Bytes of initial rows that take long enough to show how many are drawn."""


@contextmanager
def tables_by(
    config: TrainConfig, *, device_type: str, world_size: int, resume: bool, progress: bool = False
) -> Iterator[None]:
    """Within this context new tables are where [tables] says; with `resume` as the run's last steps left them.

    With `progress` it shows how many of the initial rows of large tables are drawn.

    Raises UserError where that cannot be.
    """
    if not config.tables.folder:
        for name in ("cache", "device_rows"):
            if value := getattr(config.tables, name):
                raise UserError(f"tables.{name} = {value!r} without tables.folder: name a folder")
        yield
        return
    for obstacle in _obstacles(config, device_type, world_size):
        raise UserError(f"tables.folder = {config.tables.folder!r} cannot be combined with {obstacle}")
    with progress_bar(progress) as bar:

        def begins_drawing(size: int) -> Callable[[int], object]:
            if size < _WORTH_SHOWING:
                return lambda drawn: None
            task = bar.add_task("initial rows", total=size)
            return lambda drawn: bar.advance(task, drawn)

        place = RowPlace(
            config.tables.folder,
            cache=config.tables.cache_bytes,
            owner=str(Path(config.run).absolute()),
            resume=resume,
            begins_drawing=begins_drawing,
        )
        try:
            with tables_as(mapped_in(place)):
                yield
        except BaseException:
            place.close()
            raise


def _obstacles(config: TrainConfig, device_type: str, world_size: int) -> Iterator[str]:
    """What rows in files cannot be combined with, each with its fix."""
    rows, on_device = config.tables.device_rows, device_type in CACHING
    if on_device and not rows:
        yield (
            f"training on {device_type} without tables.device_rows: say for how many rows of each table it has places, "
            "at least as many as a step looks up, or set device = 'cpu'"
        )
    elif rows and not on_device:
        yield f"tables.device_rows = {rows} on {device_type}, whose rows are where they are: leave it out"
    if on_device and config.graph == "on":
        yield "graph = 'on': the host fetches rows in each step, which no graph can ask for; set it to 'auto'"
    if config.parallel.sharded or world_size > 1:
        yield f"{world_size} processes or [parallel]: train with one process"
    if config.checkpoint.background:
        yield "checkpoint.background = true: set it to false"
    if config.grow.at:
        yield f"grow.at = {config.grow.at!r}: leave it out"


def cache_on(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Before a new model is moved to a device: let that have places for rows of tables that stay on the host."""
    if config.tables.device_rows:
        cache_tables(model, device, config.tables.device_rows)


def place_of(model: nn.Module) -> RowPlace | None:
    """Where a model's tables are in files; None of tables in memory."""
    return next((table.place for table in mapped_tables(model).values()), None)


def close_tables(model: nn.Module) -> None:
    """Let others have the files of a model's tables, which is not trained any more."""
    place = place_of(model)
    if place is not None:
        place.close()


def prepare_tables(folder: Path, model: nn.Module) -> dict[str, Any] | None:
    """Have the files of tables on the disk as they are, and name their state in a checkpoint that is being written.

    Returns the record, for `begin_tables`; None of tables in memory.
    """
    place = place_of(model)
    if place is None:
        return None
    for table in mapped_tables(model).values():
        table.settle()
    record = place.prepare()
    write_json(folder / TABLES, record)
    return record


def begin_tables(model: nn.Module, record: dict[str, Any] | None, kept: list[Path]) -> None:
    """A checkpoint with this record is in its place, and these are kept."""
    place = place_of(model)
    if place is None or record is None:
        return
    place.begin(record)
    place.forget(min(_record(folder)["mark"] for folder in kept if (folder / TABLES).is_file()))


def restore_tables(folder: Path, model: nn.Module) -> None:
    """Bring the files of tables to the state that a checkpoint names. Raises UserError where that cannot be."""
    place, has = place_of(model), (folder / TABLES).is_file()
    if place is None and has:
        raise UserError(
            f"the checkpoint {folder} has its tables in files in {_record(folder)['folder']}: resume with "
            "tables.folder set to that"
        )
    if place is not None and not has:
        raise UserError(f"the checkpoint {folder} has its tables in itself: resume without tables.folder")
    if place is not None:
        place.restore(_record(folder))


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / TABLES).read_bytes())
    return record
