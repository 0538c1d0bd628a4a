"""A folder with the tables of one model: one process trains them, and its checkpoints are states to go back to."""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerlm.errors import UserError
from peerlm.files import sync, write_json
from peerlm.layers.mapped.file import REGION, MappedFile
from peerlm.layers.mapped.store import RowStore

_PLACE, _LOCK = "place.json", "lock"
_OFTEN = 16
"""How often the cache is looked at while as many bytes are read as it holds."""


class RowPlace:
    """A folder for tables of one model, locked for this process.

    Files are mapped: the system keeps the pages in use in memory, and writes and drops others when memory is short.
    From the first `prepare` on, rows are logged before they change, so that `restore` can go back to a checkpoint.

    Args:
        folder: it may be on tmpfs. It must be empty, or hold tables of the same owner, which are removed unless
            `resume`.
        cache: bytes of files that may stay in memory, about; None: as many as the system likes.
        owner: who trains the tables, such as a run's folder.
        resume: whether tables are opened as they are, for `restore` to bring them to a checkpoint.
        temporary: whether each table's files go with it.
        begins_drawing: told how many bytes the initial rows of a table take, before they are drawn; returns what is
            told of each part that was.

    Raises:
        UserError: another process has the folder, it belongs to something else, or there is nothing to resume.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        cache: int | None = None,
        owner: str = "",
        resume: bool = False,
        temporary: bool = False,
        begins_drawing: Callable[[int], Callable[[int], object]] = lambda size: lambda drawn: None,
    ) -> None:
        self.folder, self.cache, self.temporary = Path(folder), cache, temporary
        self.resuming, self.begins_drawing = resume, begins_drawing
        self._stores: list[weakref.ref[RowStore]] = []
        self._used, self._hand = 0, 0
        if resume and not (self.folder / _PLACE).is_file():
            raise UserError(f"{self.folder} has no tables of a run to resume: restore the folder, or start another run")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._release = weakref.finalize(self, os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UserError(
                f"another process trains the tables in {self.folder}: wait for it, or choose another folder"
            ) from error
        try:
            self._state: dict[str, Any] = self._opened(owner)
        except UserError:
            self.close()
            raise

    @classmethod
    def for_a_while(cls) -> "RowPlace":
        """A folder of the system's for temporary files, which is removed with the place."""
        folder = tempfile.mkdtemp(prefix="peerlm-rows-")
        place = cls(folder, temporary=True)
        weakref.finalize(place, shutil.rmtree, folder, ignore_errors=True)
        return place

    def _opened(self, owner: str) -> dict[str, Any]:
        path = self.folder / _PLACE
        there = json.loads(path.read_text()) if path.is_file() else None
        if self.resuming:
            assert there is not None
            return dict(there)
        if there is None and any(each.name != _LOCK for each in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and has no tables of a run: choose another folder for tables")
        if there is not None and there["owner"] != owner:
            raise UserError(
                f"{self.folder} has the tables of {there['owner']}: choose another folder, or delete it if that run is "
                "not needed any more"
            )
        for each in self.folder.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
        state: dict[str, Any] = {"owner": owner, "marks": {}}
        write_json(path, state)
        return state

    def close(self) -> None:
        """Let others have the folder; tables of it must not change any more."""
        self._release()

    def new_store(self) -> RowStore:
        """A place for the next table of the model."""
        store = RowStore(self, self.folder / f"{len(self._stores):03d}")
        self._stores.append(weakref.ref(store))
        return store

    @property
    def stores(self) -> list[RowStore]:
        """Those of tables that are still there."""
        return [store for each in self._stores if (store := each()) is not None]

    # Room

    def require(self, size: int) -> None:
        """Raise a UserError where the disk has less room than these bytes and what files of tables may still take."""
        free = shutil.disk_usage(self.folder).free
        promised = sum(file.missing_bytes for file in self._files())
        if size > free - promised:
            raise UserError(
                f"the disk of {self.folder} has {_size(free - promised)} free beside the tables that are there, and a "
                f"file of {_size(size)} is to be made: free some space, or choose a folder on another disk"
            )

    def used(self, size: int) -> None:
        """So many bytes of files were read or written: look at the cache now and then."""
        self._used += size
        if self.cache is not None and self._used * _OFTEN >= self.cache:
            self._used = 0
            self.trim(self.cache)

    def resident_bytes(self) -> int:
        """How much of the files is in memory."""
        return sum(file.resident_bytes() for file in self._files())

    def trim(self, most: int) -> None:
        """Give back pages that were not used lately until no more than about this much of the files is in memory."""
        regions = [(file, begin) for file in self._files() for begin in range(0, file.num_bytes, REGION)]
        excess = self.resident_bytes() - most
        if excess <= 0:
            return
        excess += most // _OFTEN
        for _ in range(2 * len(regions)):  # the first round may find all pages in use, and marks them as not
            self._hand = (self._hand + 1) % len(regions)
            file, begin = regions[self._hand]
            excess -= file.give_back(begin)
            if excess <= 0:
                return

    def _files(self) -> list[MappedFile]:
        return [file for store in self.stores for file in store.files.values()]

    # Checkpoints

    def prepare(self) -> dict[str, Any]:
        """A state to go back to: all rows as they are now, on the disk. Returns its record, for a checkpoint.

        It counts from `begin` on, when the checkpoint is in its place.
        """
        tables = [store.record() for store in self.stores]
        marks = self._state["marks"]
        mark, token = max(map(int, marks), default=0) + 1, secrets.token_hex(8)
        marks[str(mark)] = token
        self._write()
        return {"folder": str(self.folder), "mark": mark, "token": token, "tables": tables}

    def begin(self, record: dict[str, Any]) -> None:
        """A checkpoint with this record is in its place: log what changes since."""
        for store in self.stores:
            store.begin(record["mark"])

    def forget(self, before: int) -> None:
        """Checkpoints with marks below this one are gone: nobody goes back to them."""
        marks = self._state["marks"]
        self._state["marks"] = {mark: token for mark, token in marks.items() if int(mark) >= before}
        self._write()
        for store in self.stores:
            store.forget(before)

    def restore(self, record: dict[str, Any]) -> None:
        """Bring all tables to the state of a record. Raises UserError where that cannot be."""
        marks = self._state["marks"]
        if marks.get(str(record["mark"])) != record["token"]:
            raise UserError(
                f"the tables in {self.folder} cannot go back to this checkpoint, which is none of the last of their "
                "run: resume from its newest one"
            )
        if len(record["tables"]) != len(self.stores):
            raise UserError(
                f"the checkpoint has {len(record['tables'])} tables in files, and this model {len(self.stores)}"
            )
        for store, table in zip(self.stores, record["tables"], strict=True):
            store.restore(record["mark"], table)
        self._state["marks"] = {mark: token for mark, token in marks.items() if int(mark) <= record["mark"]}
        self._write()
        self.resuming = False

    def _write(self) -> None:
        write_json(self.folder / _PLACE, self._state)
        sync(self.folder)


def _size(number: int) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**28 else f"{max(number, 0) / 2**20:.3g} MiB"
