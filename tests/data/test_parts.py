"""Text that is read in parts is the text that is read whole."""

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerlm.data import readers, tokenizer
from peerlm.errors import UserError

LINES = st.lists(st.sampled_from(["", "a", "b c", " ", "\r", "é", "x" * 9, "<|endoftext|>"]), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, ends=st.booleans())
def test_documents_are_the_same(lines: list[str], ends: bool, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("\ufeff" + "\n".join(lines) + "\n" * ends).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_PART_BYTES", 4)
        found = ["".join(parts) for parts in readers.read_text_in_parts(path, lambda num_bytes: None)]
    assert found == list(readers.read_text(path, lambda num_bytes: None))


@given(text=st.text("ab 1\n", max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_pieces_are_the_same_however_a_text_comes(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE_CHARACTERS", 8)
        patch.setattr(tokenizer, "_CUT_MARGIN", 4)
        assert list(tokenizer.pieces(iter(parts))) == list(tokenizer.pieces(text))


def test_what_is_wrong_in_a_later_part_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PART_BYTES", 4)
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\ntwo\nthree\n\xff\n")
    document = readers.read_text_in_parts(path, lambda num_bytes: None)
    parts = next(document)
    assert next(parts) == "one"
    with pytest.raises(UserError, match=r"text\.txt:4: byte 0xff is not UTF-8"):
        list(parts)
