"""Folders and files that appear whole or not at all."""

import errno
import json
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from peerlm.files import PARTIAL, atomic_folder, is_disk_full, remove_partials, write_bytes, write_json


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "target") as partial:
            (partial / name).touch()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]


@pytest.mark.parametrize("system", ["linux", "other"])
def test_a_folder_is_there_at_every_moment_of_its_replacement(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as partial:
        (partial / "old").touch()
    missing = []
    if system == "other":
        monkeypatch.setattr(sys, "platform", "other")
    for function in ("rename", "replace", "rmdir", "unlink", "open"):
        original = getattr(os, function)

        def watched(*arguments: Any, original: Any = original, **options: Any) -> Any:
            if not target.exists():
                missing.append(original.__name__)
            return original(*arguments, **options)

        monkeypatch.setattr(os, function, watched)
    with atomic_folder(target) as partial:
        (partial / "new").touch()
    monkeypatch.undo()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert len(missing) <= (system == "other")


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "target") as partial:
        (partial / "file").touch(mode=0o600)
    mode = (tmp_path / "target").stat().st_mode & 0o666
    assert (tmp_path / "target" / "file").stat().st_mode & 0o777 == mode


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("old")

    def fail(partial: Path) -> None:
        (partial / "file").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as partial:
        fail(partial)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_leftover_does_not_get_into_the_folder(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}target").mkdir()
    (tmp_path / f"{PARTIAL}target" / "leftover").touch()
    with atomic_folder(tmp_path / "target"):
        pass
    assert list((tmp_path / "target").iterdir()) == []


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (tmp_path / f"{PARTIAL}file").touch()
    (tmp_path / f"{PARTIAL}folder").mkdir()
    (tmp_path / f"{PARTIAL}folder" / "file").touch()
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("bad"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is full


def test_a_device_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"content")
    reader.join(10)
    assert read == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
