"""Folders of text: links followed once, what cannot be read named before the work, what is not read counted."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from peerlm.data import read_documents, text_files
from peerlm.data.sources import resolve, survey
from peerlm.data.text_files import file_kind, files_of, suffix_of
from peerlm.errors import UserError


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_of(folder).read]


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [
        ("a.txt", "text", ".txt"),
        ("A.MD", "text", ".md"),
        ("a.rst.gz", "text", ".rst.gz"),
        ("wiki.test.tokens", "text", ".tokens"),
        ("a.ndjson.xz", "jsonl", ".ndjson.xz"),
        ("a.parquet", "parquet", ".parquet"),
        ("a.parquet.gz", None, ".parquet.gz"),
        ("a.html", None, ".html"),
        ("a.jsonl.zst", None, ".jsonl.zst"),
        ("README", None, "no suffix"),
    ],
)
def test_a_name_says_what_a_file_holds(name: str, kind: str | None, suffix: str) -> None:
    assert file_kind(Path(name)) == kind
    assert suffix_of(Path(name)) == suffix


def test_text_of_every_plain_suffix_is_read(tmp_path: Path) -> None:
    for name in ("a.md", "b.rst", "c.text", "d.txt", "e.org"):
        write(tmp_path / name, name)
    assert list(read_documents([tmp_path])) == ["a.md", "b.rst", "c.text", "d.txt", "e.org"]


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store" / "b.txt", "b")
    write(tmp_path / "blob", "c")
    write(tmp_path / "real" / "a.txt", "a")
    (tmp_path / "real" / "more").symlink_to("../store")
    (tmp_path / "real" / "c.txt").symlink_to("../blob")
    assert list(read_documents([tmp_path / "real"])) == ["a", "c", "b"]
    (tmp_path / "other").symlink_to("real")
    assert len(resolve([tmp_path / "other"])) == 3


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "one.txt")
    write(tmp_path / "outside.txt")
    (tmp_path / "a" / "b" / "again").symlink_to("..")
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "side").symlink_to("b")
    found = files_of(tmp_path / "a")
    assert names(tmp_path / "a") == ["b/one.txt"]
    assert found.passed_over == {"link to a parent": 3, "read already": 1}


def test_what_is_reached_by_two_names_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "z.txt")
    (tmp_path / "a.txt").symlink_to("z.txt")
    assert names(tmp_path) == ["a.txt"]
    assert files_of(tmp_path).passed_over == {"read already": 1}


def test_everything_that_is_not_read_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.html", "c.html", "sub/d.PNG", ".hidden.txt", ".git/x.txt", ".git/y.txt", "notes"):
        write(tmp_path / name)
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")
    found = survey([tmp_path])
    assert found.read == {".txt": 1}
    assert found.passed_over == {".html": 2, ".png": 1, "hidden": 2, "no suffix": 1, "empty": 1, "not a file": 1}


def test_a_folder_with_nothing_to_read_is_an_error_that_says_what_it_has(tmp_path: Path) -> None:
    for number in range(3000):
        write(tmp_path / f"{number}.x{number % 40}")
    with pytest.raises(
        UserError, match=r"has no file to read \(passed over: 75 \.x.*and 32 more\): names must"
    ) as caught:
        resolve([tmp_path])
    assert len(str(caught.value)) < 500


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    for source in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(UserError, match=r"b\.txt is a link to gone\.txt, which is not there: restore it"):
            resolve([source])
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to("b.txt")
    with pytest.raises(UserError, match=r"b\.txt is a link to b\.txt, which is not there"):
        resolve([tmp_path])


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("text")
    for source in (tmp_path, Path(os.fsdecode(path))):
        with pytest.raises(UserError, match=r"the file name .*/caf\\xe9\.txt is not UTF-8: rename the file") as caught:
            resolve([source])
        str(caught.value).encode()


def test_a_name_that_is_not_utf8_is_no_matter_where_the_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"png")
    assert survey([tmp_path]).passed_over == {".png": 1}


@pytest.mark.parametrize("forbidden", ["a.txt", "sub"])
def test_what_may_not_be_read_is_an_error(forbidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "sub" / "b.txt")
    monkeypatch.setattr(text_files.os, "access", lambda path, mode: Path(path).name != forbidden)
    with pytest.raises(UserError, match=rf"{forbidden} may not be read by this user: change its permissions"):
        resolve([tmp_path])


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("make", [make_pipe, make_socket])
def test_a_pipe_or_socket_that_is_named_is_an_error(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make(Path("a.txt"))
    with pytest.raises(UserError, match=r"a\.txt is not a file \(text is read more than once\): write the text to a"):
        resolve(["a.txt"])


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    assert list(read_documents([write(tmp_path / ".a.txt", "x")])) == ["x"]
