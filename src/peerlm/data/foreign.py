"""Token files that others made: where their tokens lie, and where their documents end.

Megatron-LM (`NAME.bin` with `NAME.idx`), datatrove (`NAME.ds` with `NAME.ds.index`), and Hugging Face data sets of
token ids that `save_to_disk` wrote, whose Arrow files are read in place. Parquet is compressed: its tokens come as
arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peerlm.errors import UserError, listed

Lengths = npt.NDArray[np.int64]

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The codes of integers (`DType` in Megatron-LM's megatron/core/datasets/indexed_dataset.py); 6 and 7 are floats."""
_FIX = "restore the file, or make it again"


@dataclass(frozen=True)
class Extent:
    """Tokens that lie one after another in a file."""

    path: Path
    offset: int
    """Bytes before the first."""
    items: int
    dtype: str
    """numpy name of their type, as it is in the file."""


@dataclass(frozen=True)
class Opened:
    """One source."""

    extents: list[Extent]
    """Where its tokens lie, in order."""
    lengths: Lengths
    """(num_documents,) int64: tokens of each document, in order."""


def is_parquet(source: Path) -> bool:
    """Whether the tokens of a source have to be copied, since its file is compressed."""
    return source.suffix == ".parquet"


def resolve(sources: list[Path]) -> list[Path]:
    """The files and data sets that are named: a folder stands for those that lie in it, in the order of their names.

    Raises:
        UserError: nothing is there, or nothing that is known.
    """
    return [found for source in sources for found in _resolve_one(source)]


def _resolve_one(source: Path) -> list[Path]:
    if source.is_dir() and (source / "state.json").is_file():
        return [source]
    if source.is_dir():
        if (source / "dataset_dict.json").is_file():
            splits = sorted(path.name for path in source.iterdir() if (path / "state.json").is_file())
            raise UserError(f"{source} holds the splits {listed(splits)}: name one of them, as in {source}/{splits[0]}")
        found = sorted(path for path in source.iterdir() if path.suffix in (".bin", ".ds", ".parquet"))
        if not found:
            raise UserError(f"{source} holds no token files: there is no .bin, .ds, .parquet or state.json in it")
        return found
    if not source.suffix and source.with_name(source.name + ".idx").is_file():  # as Megatron-LM names them
        return [source.with_name(source.name + ".bin")]
    path = source.with_suffix(".bin") if source.suffix == ".idx" else source
    if path.suffix not in (".bin", ".ds", ".parquet"):
        raise UserError(
            f"{source} is of an unknown kind: name Megatron-LM's .bin, datatrove's .ds, a .parquet file, or a "
            "folder that datasets.save_to_disk wrote"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist: correct the path")
    return [path]


def open_source(source: Path, field: str) -> Opened:
    """Find the tokens of a source that `resolve` gave, parquet apart; `field` is the column of a data set.

    Raises:
        UserError: a file is missing, cut off, or not what its name says.
    """
    if source.is_dir():
        return _dataset(source, field)
    return _megatron(source) if source.suffix == ".bin" else _datatrove(source)


def _megatron(path: Path) -> Opened:
    index = path.with_suffix(".idx")
    data = _read(index, path)
    if data[: len(_MEGATRON_MAGIC)] != _MEGATRON_MAGIC:
        raise UserError(f"{index} is no index of Megatron-LM (it does not begin with MMIDIDX): {_FIX}")
    start = len(_MEGATRON_MAGIC)
    if len(data) < start + 25:
        raise UserError(f"{index} is cut off within its header, at {len(data)} bytes: {_FIX}")
    version, sequences, documents = (int.from_bytes(data[start + at : start + at + 8], "little") for at in (0, 9, 17))
    code = data[start + 8]
    if version != 1:
        raise UserError(f"{index} has version {version}, and version 1 is known: {_FIX}")
    if code not in _MEGATRON_DTYPES:
        raise UserError(f"{index} says that tokens have type {code}, which is no integer of Megatron-LM's: {_FIX}")
    start += 25
    needed = start + 12 * sequences + 8 * documents
    if len(data) < needed:
        raise UserError(f"{index} has {len(data)} bytes, and {sequences:,} sequences take {needed}: {_FIX}")
    lengths = np.frombuffer(data, "<i4", sequences, start).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, start + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", documents, start + 12 * sequences)
    if not documents or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any() or (lengths < 0).any():
        raise UserError(f"{index} has documents that are not its {sequences:,} sequences in order: {_FIX}")
    dtype = _MEGATRON_DTYPES[code]
    size, num_bytes = np.dtype(dtype).itemsize, path.stat().st_size
    ends = pointers + lengths * size
    if sequences and (pointers.min() < 0 or ends.max() != num_bytes):
        raise UserError(f"{path} has {num_bytes} bytes, not the {ends.max()} that {index.name} says: {_FIX}")
    first = np.flatnonzero(np.r_[True, pointers[1:] != ends[:-1]][:sequences])  # of each run without a gap
    runs = np.add.reduceat(lengths, first) if sequences else lengths
    extents = [Extent(path, int(pointers[at]), int(run), dtype) for at, run in zip(first, runs, strict=True)]
    return Opened(extents, np.diff(np.r_[0, np.cumsum(lengths)][bounds]))


def _datatrove(path: Path) -> Opened:
    index = path.with_name(path.name + ".index")
    data = _read(index, path)
    ends = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
    if len(data) % 8 or not len(ends) or (np.diff(ends, prepend=0) < 0).any():
        raise UserError(f"{index} is no index of datatrove (document ends in order, 8 bytes each): {_FIX}")
    num_bytes, tokens = path.stat().st_size, int(ends[-1])
    size = num_bytes // tokens if tokens else 0
    if size not in (2, 4) or size * tokens != num_bytes:
        raise UserError(f"{path} has {num_bytes} bytes, not 2 or 4 for each of its index's {tokens:,} tokens: {_FIX}")
    metadata = path.with_name(path.name + ".metadata")
    if metadata.is_file():  # "TOKENIZER|BYTES OF A TOKEN", the number of tokens, and that in words
        said = metadata.read_text(encoding="utf-8").split("\n")
        stated = said[0].rpartition("|")[2]
        if stated in ("2", "4") and "|" in said[0] and int(stated) != size:
            raise UserError(
                f"{metadata} says that tokens have {stated} bytes, and in {path.name} they have {size}: {_FIX}"
            )
        if len(said) > 1 and said[1].isdigit() and int(said[1]) != tokens:
            raise UserError(f"{metadata} counts {int(said[1]):,} tokens, and {index.name} {tokens:,}: {_FIX}")
    return Opened([Extent(path, 0, tokens, f"<u{size}")], np.diff(ends, prepend=0))


def _read(index: Path, path: Path) -> bytes:
    if not index.is_file():
        raise UserError(f"{path} has no index {index.name} beside it, which says where documents end: restore it")
    return index.read_bytes()


def _dataset(folder: Path, field: str) -> Opened:
    pyarrow = _pyarrow(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / each["filename"] for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json is damaged ({error}): save the data set again") from error
    extents: list[Extent] = []
    lengths: list[Lengths] = [np.empty(0, np.int64)]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing: save the data set again")
        try:
            with pyarrow.memory_map(str(path)) as mapped:
                base, num_bytes = mapped.read_buffer().address, path.stat().st_size
                mapped.seek(0)
                for batch in pyarrow.ipc.open_stream(mapped):
                    values, of_rows = _values(batch, field, path)
                    lengths.append(of_rows)
                    if not len(values):
                        continue
                    size = values.type.bit_width // 8
                    offset = values.buffers()[1].address + values.offset * size - base
                    if not 0 <= offset <= num_bytes - len(values) * size:
                        raise UserError(f"{path} is compressed and cannot be read in place: save it as parquet instead")
                    extents.append(Extent(path, offset, len(values), np.dtype(values.type.to_pandas_dtype()).str))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is no Arrow file that can be read ({error}): save the data set again") from error
    return Opened(extents, np.concatenate(lengths))


def read_parquet(path: Path, field: str) -> Iterator[tuple[npt.NDArray[np.integer[Any]], Lengths]]:
    """Tokens and lengths of a parquet file's rows, some thousand at a time.

    Raises:
        UserError: a file that is damaged, or has no such column of token ids.
    """
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_column(path, field, file.schema_arrow.names)
            for batch in file.iter_batches(columns=[field]):
                values, lengths = _values(batch, field, path)
                yield values.to_numpy(zero_copy_only=False), lengths
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or one that is cut off ({error}): restore it") from error


def _pyarrow(source: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f'{source} needs pyarrow to be read: pip install "peerlm[data]"') from error
    return pyarrow


def _values(batch: Any, field: str, path: Path) -> tuple[Any, Lengths]:
    """The tokens of a batch of rows, as a flat Arrow array, and each row's number of them."""
    import pyarrow

    if field not in batch.schema.names:
        raise _no_column(path, field, batch.schema.names)
    column = batch.column(field)
    kinds = pyarrow.types
    is_list = kinds.is_list(column.type) or kinds.is_large_list(column.type) or kinds.is_fixed_size_list(column.type)
    if not is_list or not kinds.is_integer(column.type.value_type):
        raise UserError(f"{path}: column {field!r} holds {column.type}, not lists of ids: name another by --field")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise UserError(f"{path}: column {field!r} has rows or tokens without a value: fill or remove them")
    if kinds.is_fixed_size_list(column.type):
        return values, np.full(len(column), column.type.list_size, np.int64)
    return values, np.diff(column.offsets.to_numpy()).astype(np.int64)


def _no_column(path: Path, field: str, names: list[str]) -> UserError:
    return UserError(f"{path} has no column {field!r}, but {listed(names)}: name one of token ids by --field")
