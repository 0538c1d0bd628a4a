"""Several processes prepare what one does, bit for bit; a preparation that was killed resumes to the same bits."""

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.data import prepare
from peerlm.data import workers as workers_module
from peerlm.data.writer import SplitWriter
from peerlm.errors import PeerlmWarning

from ..processes import run

preparation = importlib.import_module("peerlm.data.preparation")
tokenizer_module = importlib.import_module("peerlm.data.tokenizer")


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch.setattr)


def cut_small(set_to: Callable[..., None]) -> None:
    """Pieces of 60 characters, batches of a few pieces, each saved when it is written."""
    set_to(tokenizer_module, "_PIECE_CHARACTERS", 60)
    set_to(preparation, "_BATCH_CHARACTERS", 300)
    set_to(preparation, "_SECONDS_UNTIL_SAVED", 0.0)


def small(source: Path, output: Path, **options: Any) -> dict[str, bytes]:
    """Prepare; the files that come of it."""
    prepare([source], output, vocab_size=300, holdout=0.2, shard_tokens=500, progress=False, **options)
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("many_batches")
def test_several_processes_write_what_one_does(text_file: Path, tmp_path: Path) -> None:
    alone = small(text_file, tmp_path / "1")
    assert len(alone) > 8
    assert small(text_file, tmp_path / "3", workers=3) == alone
    assert "TOKENIZERS_PARALLELISM" in os.environ
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.usefixtures("many_batches")
def test_what_a_tokenizer_loses_is_counted_alike(
    text_file: Path, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    make_tokenizer("spaces", unk="<unk>").save_pretrained(tmp_path / "tokenizer")
    said = []
    for count in (1, 2):
        with pytest.warns(PeerlmWarning) as caught:
            files = small(text_file, tmp_path / str(count), tokenizer=tmp_path / "tokenizer", workers=count)
        said.append((sorted(str(each.message) for each in caught), files))
    assert said[0] == said[1]
    assert "does not know" in "".join(said[0][0])


class Stop:
    """In place of `SplitWriter.end_document`: kill or interrupt this process within the given document."""

    def __init__(self, document: int, act: Callable[[], None]) -> None:
        self._left, self._act, self._end = document, act, SplitWriter.end_document

    def __call__(self, writer: SplitWriter, num_bytes: int) -> None:
        if not self._left:
            self._act()
        self._left -= 1
        self._end(writer, num_bytes)


def interrupt() -> None:
    raise KeyboardInterrupt


def prepare_until_killed(source: Path, output: Path, document: int) -> None:
    cut_small(setattr)
    stop = Stop(document, lambda: os.kill(os.getpid(), signal.SIGKILL))
    SplitWriter.end_document = lambda self, num_bytes: stop(self, num_bytes)  # type: ignore[method-assign]
    small(source, output)


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("document", [3, 17, 39])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_resumes_to_the_same_bits(
    document: int,
    workers: int,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight = small(text_file, tmp_path / "straight")
    code, said = run(tmp_path / "said", {}, prepare_until_killed, text_file, tmp_path / "out", document)
    assert code == -signal.SIGKILL, said
    (left,) = tmp_path.glob("out.partial-*")
    with (left / "train-ends.bin").open("ab") as file:  # what came after the last save is cut off
        file.write(b"12345678")
    monkeypatch.setattr(preparation, "_scan", None)
    monkeypatch.setattr(preparation, "_learn", None)
    assert small(text_file, tmp_path / "out", workers=workers) == straight
    assert "Resuming: " in caplog.text
    assert not left.exists()


@pytest.mark.usefixtures("many_batches")
def test_an_interrupted_preparation_says_what_it_keeps(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Stop(12, interrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitWriter, "end_document", lambda self, num_bytes: stop(self, num_bytes))
        with pytest.raises(KeyboardInterrupt):
            small(text_file, tmp_path / "out")
    assert f"What is done is kept in {tmp_path}/out.partial-" in caplog.text
    other = text_file.with_name("other.txt")
    other.write_text(text_file.read_text() + "more")
    small(other, tmp_path / "out2")
    assert len(list(tmp_path.glob("out.partial-*"))) == 1
    assert small(text_file, tmp_path / "out") == small(text_file, tmp_path / "straight")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], pytest.MonkeyPatch]]:
    """A function: what a worker does with the fourth batch in place of encoding it."""
    encode = workers_module._encode

    def set_to(act: Callable[[], None]) -> pytest.MonkeyPatch:
        def encode_or_fail(encoder: Any, batch: Any) -> Any:
            if any("Document 7." in text for text in batch[0]):
                act()
            return encode(encoder, batch)

        monkeypatch.setattr(workers_module, "_encode", encode_or_fail)
        return monkeypatch

    return set_to


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("no such token")


@pytest.mark.usefixtures("many_batches")
def test_a_killed_worker_is_one_sentence_and_the_same_again_resumes(
    broken: Callable[..., pytest.MonkeyPatch], text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patch = broken(kill_me)
    with pytest.raises(
        UserError, match=r"one of the 2 processes that tokenize was killed, perhaps .*: run the same again"
    ):
        small(text_file, tmp_path / "out", workers=2)
    patch.undo()
    cut_small(patch.setattr)
    assert small(text_file, tmp_path / "out", workers=2) == small(text_file, tmp_path / "straight")
    assert "Resuming: " in caplog.text


@pytest.mark.usefixtures("many_batches")
def test_a_worker_that_fails_is_one_sentence(
    broken: Callable[..., pytest.MonkeyPatch], text_file: Path, tmp_path: Path
) -> None:
    broken(fail)
    with pytest.raises(UserError, match=r"^a process that tokenizes failed \(ValueError: no such token\)$"):
        small(text_file, tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == [text_file]


def test_two_at_once_are_refused(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []
    scan = preparation._scan

    def scan_while_another_begins(*arguments: Any) -> Any:
        (folder,) = tmp_path.glob("out.partial-*")
        locked.append(folder)
        with pytest.raises(UserError, match=r"another process prepares .*out at this moment: wait for its end"):
            small(text_file, tmp_path / "out")
        return scan(*arguments)

    monkeypatch.setattr(preparation, "_scan", scan_while_another_begins)
    small(text_file, tmp_path / "out")
    assert len(locked) == 1


def test_at_least_one_process(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers is 0: it must be at least 1"):
        small(text_file, tmp_path / "out", workers=0)
