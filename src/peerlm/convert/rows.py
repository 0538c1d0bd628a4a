"""Store the rows of a saved model's tables in another format, in another folder, without a whole table in memory."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peerlm.convert.record import conversion_of
from peerlm.convert.saved import load_saved, save_changed
from peerlm.errors import UserError
from peerlm.files import free_bytes
from peerlm.layers import PEER, ExpertTable
from peerlm.layers.table import row_dtype
from peerlm.model import PeerConfig
from peerlm.model.table_files import file_names, write_index
from peerlm.ops.row_formats import SCALED_DTYPES, scales_shape, stored_shape
from peerlm.ops.tensor_files import head_of, num_bytes, write_at

Stored = dict[str, tuple[Sequence[int], torch.dtype]]
"""Shape and dtype of the "rows" and, where there are some, "scales" of a table."""


def convert_rows_of_folder(source: Path, output: Path, row_format: str) -> dict[str, Any]:
    """Convert the rows of the PEER layers of a language model that `save_pretrained` wrote, into another folder.

    Rows are read from the source's files and written into the output's a few at a time: neither table is ever whole in
    memory. Each table gets a file of its own, which `from_pretrained` maps.

    Args:
        source: its folder.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        row_format: a name in `peerlm.layers.table.ROW_FORMATS`.

    Returns:
        "layers" (their paths), "format_before" (of the first), "format_after", "row_bytes_before", "row_bytes_after"
        (of all tables).

    Raises:
        UserError: the output exists, the model cannot be read or has no PEER layers, its rows have no such format, or
            the disk has no room.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    model = load_saved(source)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PEER)}
    if not layers or not isinstance(model.config, PeerConfig):
        raise UserError(f"{source} is no language model with PEER layers, whose configuration could name a row format")
    if conversion_of(model) is not None:
        raise UserError(
            f"{source} was converted (`peerlm convert`), and its layers have settings of their own, which name no row "
            "format: take a model of PEER layers that was trained as one"
        )
    experts = {id(layer.experts) for layer in layers.values()}
    tables: dict[str, Any] = {path: module for path, module in model.named_modules() if id(module) in experts}
    try:
        stored = {path: _stored(table, row_format) for path, table in tables.items()}
    except ValueError as error:
        raise UserError(f"cannot convert the rows of {source}: {error}") from error
    sizes = [sum(num_bytes(*each) for each in kinds.values()) for kinds in stored.values()]
    facts = {
        "layers": list(layers),
        "format_before": next(iter(tables.values())).row_format,
        "format_after": row_format,
        "row_bytes_before": sum(table.row_bytes * table.num_rows for table in tables.values()),
        "row_bytes_after": sum(sizes),
    }
    _require_room(output, model, facts)
    _name_format(model, row_format)
    save_changed(model, source, output, write=lambda folder: _write(model, tables, stored, row_format, folder))
    return facts


def _stored(table: ExpertTable, row_format: str) -> Stored:
    """What a table is in another format; raises ValueError where it has none."""
    dtype, shape = row_dtype(row_format), (table.num_rows, *table.row_shape)
    found: Stored = {"rows": (stored_shape(shape, dtype), dtype)}
    if dtype in SCALED_DTYPES:
        found["scales"] = (scales_shape(shape, dtype), torch.float32)
    return found


def _require_room(output: Path, model: PreTrainedModel, facts: Mapping[str, Any]) -> None:
    others = sum(each.nbytes for each in model.state_dict().values()) - facts["row_bytes_before"]
    needed, free = others + facts["row_bytes_after"], free_bytes(output)
    if needed > free:
        raise UserError(
            f"the disk of {output} has {free / 1e9:.3g} GB free, and the converted model takes {needed / 1e9:.3g} GB: "
            "free some space, or choose a folder on another disk"
        )


def _write(
    model: PreTrainedModel,
    tables: Mapping[str, ExpertTable],
    stored: Mapping[str, Stored],
    row_format: str,
    folder: Path,
) -> None:
    """As the model's `save_pretrained`, with tables in the other format."""
    own = {f"{path}.{kind}" for path in tables for kind in ("rows", "scales")}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    model.save_pretrained(folder, state_dict=rest, max_shard_size="1000TB")
    files = file_names([f"{path}.{kind}" for path, kinds in stored.items() for kind in kinds])
    for path, table in tables.items():
        with ExitStack() as opened:
            starts: dict[str, tuple[Any, int]] = {}
            for kind, (shape, dtype) in stored[path].items():
                name = f"{path}.{kind}"
                file, head = opened.enter_context((folder / files[name]).open("wb")), head_of(name, shape, dtype)
                file.write(head)
                file.truncate(len(head) + num_bytes(shape, dtype))
                file.flush()
                starts[kind] = file, len(head)
            for part, rows, scales in table.rows_in(row_format):
                for kind, values in (("rows", rows), ("scales", scales)):
                    if values is not None:
                        file, start = starts[kind]
                        write_at(file.fileno(), values, start + part.start * values[:1].nbytes)
    write_index(folder, files)


def _name_format(model: PreTrainedModel, row_format: str) -> None:
    model.config.peer = {**(model.config.peer or {}), "row_format": row_format}
