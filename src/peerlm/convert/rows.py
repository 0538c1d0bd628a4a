"""Store the rows of a saved model's tables in another format, in another folder."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peerlm.convert.saved import load_saved, save_changed
from peerlm.errors import UserError
from peerlm.layers import PEER
from peerlm.model import PeerConfig


def convert_rows_of_folder(source: Path, output: Path, row_format: str) -> dict[str, Any]:
    """Load a language model that `save_pretrained` wrote, convert the rows of its PEER layers, and save it.

    Args:
        source: its folder.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        row_format: a name in `peerlm.layers.table.ROW_FORMATS`.

    Returns:
        "layers" (their paths), "format_before" (of the first), "format_after", "row_bytes_before", "row_bytes_after"
        (of all tables).

    Raises:
        UserError: the output exists, the model cannot be read or has no PEER layers, or its rows have no such format.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    model = load_saved(source)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PEER)}
    if not layers or not isinstance(model.config, PeerConfig):
        raise UserError(f"{source} is no language model with PEER layers, whose configuration could name a row format")
    tables = {id(layer.experts): layer.experts for layer in layers.values()}
    before = next(iter(tables.values())).row_format, _bytes(tables.values())
    try:
        for table in tables.values():
            table.convert_rows(row_format)
    except ValueError as error:
        raise UserError(f"cannot convert the rows of {source}: {error}") from error
    _name_format(model, row_format)
    save_changed(model, source, output)
    return {
        "layers": list(layers),
        "format_before": before[0],
        "format_after": row_format,
        "row_bytes_before": before[1],
        "row_bytes_after": _bytes(tables.values()),
    }


def _bytes(tables: Any) -> int:
    return sum(table.row_bytes * table.num_rows for table in tables)


def _name_format(model: PreTrainedModel, row_format: str) -> None:
    model.config.peer = {**(model.config.peer or {}), "row_format": row_format}
