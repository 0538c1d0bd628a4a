"""The files of one table: its rows, what an optimizer keeps of each, and the logs by which changes are taken back."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.files import sync
from peerlm.layers.mapped.file import MappedFile
from peerlm.layers.mapped.undo import UndoLog, read_undo
from peerlm.layers.row_memory import blocks
from peerlm.ops.tensor_files import DTYPES, num_bytes

if TYPE_CHECKING:
    from peerlm.layers.mapped.cache import RowCache
    from peerlm.layers.mapped.place import RowPlace

_BYTES_AT_ONCE = 1 << 26
_WORTH_WATCHING = 1 << 26
"""Bytes of a file of which pages are read ahead and given back."""

Record = dict[str, dict[str, Any]]
"""Shape and dtype of a table's tensors by their names, as JSON has them."""


class RowStore:
    """Tensors of one table by name, in a folder of a `RowPlace`; it is the `ops.row_keeping.RowKeeper` of its rows.

    Tensors given out share the memory of the files, and stay valid as long as they are not replaced.
    """

    def __init__(self, place: "RowPlace", folder: Path) -> None:
        self.place, self.folder = place, folder
        self.files: dict[str, MappedFile] = {}
        self.front: RowCache | None = None
        """What has newer rows than the files."""
        self._undo: UndoLog | None = None
        self._logged = torch.empty(0, dtype=torch.bool, device="cpu")
        folder.mkdir(parents=True, exist_ok=True)
        if place.temporary:
            weakref.finalize(self, rmtree, folder, ignore_errors=True)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is the one of this name, by its memory."""
        file = self.files.get(name)
        if file is None or tensor.shape != file.shape or tensor.layout != torch.strided:  # a sparse gradient of rows
            return False
        return tensor.data_ptr() == file.tensor.data_ptr()

    def __reduce__(self) -> Any:
        """Copies of rows are in memory, and have no store."""
        return type(None), ()

    # New and other tensors

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in the place of what had the name; where a run is resumed, what the file has.

        Raises:
            UserError: the disk has no room, or there is no file of the run to resume.
            RuntimeError: a checkpoint needs what has the name.
        """
        path = self._path(name)
        if self.place.resuming:
            self.files[name] = MappedFile(path, shape, dtype)
            return self.files[name].tensor
        self._check_replaceable(name)
        self.place.require(num_bytes(shape, dtype))
        self.files[name] = MappedFile.create(path, shape, dtype)
        return self.files[name].tensor

    def copy(self, name: str, source: Tensor, change: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor:
        """A tensor of this name with what `change` makes of the rows of `source`, some at a time."""
        probe = change(source[:0])
        target = self.new(name, (len(source), *probe.shape[1:]), probe.dtype)
        if not self.place.resuming:
            for part in blocks(len(source), _BYTES_AT_ONCE, source[:1].nbytes):
                target[part].copy_(change(source[part]))
                self.place.used(target[part].nbytes)
        return target

    def lengthen(self, name: str, count: int, value: float = 0.0) -> Tensor:
        """The tensor of this name with `count` rows, new ones filled with a number; the old one is not used again."""
        before = self.files.pop(name)
        self.place.require(max(0, count - before.shape[0]) * before.row_bytes)
        self.files[name] = after = before.with_length(count)
        if value:
            after.tensor[before.shape[0] :] = value
        if len(self._logged) and len(self._logged) < count:
            self._logged = torch.cat([self._logged, self._logged.new_zeros(count - len(self._logged))])
        return after.tensor

    def select(self, name: str, ids: Tensor) -> Tensor:
        """The tensor of this name with these rows alone, in this order."""
        before = self.files[name]
        after = self.new(name, (len(ids), *before.shape[1:]), before.dtype)
        file = self.files[name]
        for part in blocks(len(ids), _BYTES_AT_ONCE, before.row_bytes):
            torch.index_select(before.bytes, 0, ids[part], out=file.bytes[part])
            self.place.used(file.bytes[part].nbytes)
        return after

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self.files[name].tensor

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a tensor that was given out."""
        return next((name for name in self.files if self.holds(name, tensor)), None)

    def _check_replaceable(self, name: str) -> None:
        if self._undo is not None and name in self.files:
            raise RuntimeError(
                f"the {name} of a table in {self.folder} belong to a checkpoint, and would be lost: rows in files are "
                "renumbered, removed or converted outside of a run"
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    # As `RowKeeper`

    names = None

    @property
    def num_rows(self) -> int:
        """How many rows the table has."""
        return next((file.shape[0] for file in self.files.values()), 0)

    def require(self, size: int) -> None:
        """Raise UserError where the disk has no room for this and for what files of tables may still take."""
        if not self.place.resuming:
            self.place.require(size)

    def before_change(self, ids: Tensor | None) -> None:
        """Log rows as they are that change for the first time since the last checkpoint; none before the first."""
        if self._undo is None:
            return
        if ids is None:
            for block in blocks(len(self._logged), _BYTES_AT_ONCE, self._row_bytes):
                self._log((~self._logged[block]).nonzero().flatten() + block.start, block)
            return
        ids = ids.reshape(-1)
        new = ids[(ids >= 0) & ~self._logged[ids]]
        for part in self.parts(new.unique()):
            self._log(part)

    def _log(self, ids: Tensor, near: slice | None = None) -> None:
        if not len(ids):
            return
        assert self._undo is not None
        if near is not None:
            for file in self.files.values():
                file.expect(near.start, near.stop - near.start)
        self._undo.append(ids, {name: file.bytes[ids] for name, file in self.files.items()})
        self._logged[ids] = True

    def parts(self, ids: Tensor) -> Sequence[Tensor]:
        """The ids in pieces that are logged, then changed."""
        return ids.split(max(1, _BYTES_AT_ONCE // max(1, self._row_bytes)))

    @property
    def _row_bytes(self) -> int:
        return sum(file.row_bytes for file in self.files.values())

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in a file; where a checkpoint needs what is there, the old values are logged."""
        file = self.files.get(name)
        if self._undo is not None and file is not None and (file.shape, file.dtype) == (tuple(shape), dtype):
            self.before_change(None)
            file.tensor.zero_()
            return file.tensor
        return self.new(name, shape, dtype)

    def put_state(self, name: str, values: Tensor) -> None:
        """As `new_state`, with these values."""
        self.new_state(name, values.shape, values.dtype).copy_(values)

    def kept_state(self, name: str) -> Tensor | None:
        """What `new_state` gave before."""
        return self.files[name].tensor if name in self.files else None

    state_here = kept_state

    def stale(self, now: int) -> Iterator[Tensor | None]:
        """Rows are where they are."""
        yield None

    # Memory

    def use(self, ids: Tensor, *, training: bool) -> None:
        """Have rows in memory that are read next, in training with what changes them."""
        for name, file in self.files.items():
            if file.num_bytes >= _WORTH_WATCHING and (training or name in ("rows", "scales")):
                self.place.used(file.use(ids))

    # Checkpoints

    def record(self) -> Record:
        """Wait until all is on the disk; returns what there is."""
        if self.front is not None:
            self.front.settle()
        for file in self.files.values():
            file.flush()
        sync(self.folder)
        words = {dtype: word for word, dtype in DTYPES.items()}
        return {name: {"shape": file.shape, "dtype": words[file.dtype]} for name, file in self.files.items()}

    def begin(self, mark: int) -> None:
        """From now on log what changes, under the number of the checkpoint that it is to be taken back to."""
        if self._undo is not None:
            self._undo.close()
        self._undo = UndoLog(self._log_path(mark))
        self._logged = torch.zeros(self.num_rows, dtype=torch.bool, device="cpu")

    def restore(self, mark: int, record: Mapping[str, Any]) -> None:
        """Bring all files back to what they were at a checkpoint; what this leaves undone, a second call does."""
        for name, file in self.files.items():
            if name not in record or tuple(record[name]["shape"]) != file.shape:
                raise UserError(f"the checkpoint's table in {self.folder} has other {name} than this model: {record}")
        for name, each in record.items():
            if name not in self.files:
                self.files[name] = MappedFile(self._path(name), each["shape"], DTYPES[each["dtype"]])
        logs = sorted(number for number in self._log_numbers() if number >= mark)
        for number in reversed(logs):
            for ids, rows in read_undo(self._log_path(number)):
                for name, values in rows.items():
                    if name in record:
                        here = ids < self.files[name].shape[0]
                        self.files[name].bytes[ids[here]] = values[here]
        for file in self.files.values():
            file.flush()
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in record:
                path.unlink()
        for number in reversed(logs):
            self._log_path(number).unlink()
        self.begin(mark)
        if self.front is not None:
            self.front.refresh()

    def forget(self, before: int) -> None:
        """Remove logs that lead to checkpoints older than this one."""
        for number in self._log_numbers():
            if number < before:
                self._log_path(number).unlink()

    def _log_path(self, mark: int) -> Path:
        return self.folder / f"undo-{mark:08d}.log"

    def _log_numbers(self) -> list[int]:
        return [int(path.stem.removeprefix("undo-")) for path in self.folder.glob("undo-*.log")]
