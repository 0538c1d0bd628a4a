"""Tokenizers: any text comes back unchanged, pieces have the tokens of the whole, wrong files say so."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peerlm.data import load_tokenizer, tokenizer
from peerlm.data.tokenizer import encoder, open_tokenizer, pieces, train_tokenizer
from peerlm.errors import UserError


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the quick brown fox, the lazy dog; naïve Москва"] * 5, 300)


@given(st.text(st.characters(codec="utf-8")))
def test_text_comes_back(trained: PreTrainedTokenizerFast, text: str) -> None:
    ids = encoder(trained).encode(text, add_special_tokens=False).ids
    assert trained.decode(ids) == text
    assert trained.eos_token_id not in ids


def test_special_tokens(trained: PreTrainedTokenizerFast) -> None:
    assert trained.eos_token_id == trained.bos_token_id == trained.pad_token_id == 0
    assert trained.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert trained.convert_tokens_to_ids("Ġ") < 257


def test_a_special_token_in_a_document_is_text(trained: PreTrainedTokenizerFast) -> None:
    ids = encoder(trained).encode("a<|endoftext|>b", add_special_tokens=False).ids
    assert trained.eos_token_id not in ids
    assert trained.decode(ids) == "a<|endoftext|>b"


def test_training_is_deterministic(documents: list[str]) -> None:
    first, second = (train_tokenizer(documents, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_short_text_learns_fewer_tokens() -> None:
    assert 257 <= len(train_tokenizer(["ab"], 5000)) < 300


@given(st.text(st.sampled_from("ab É東 \n.1"), max_size=200), st.integers(1, 20))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE_CHARACTERS", size)
        cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= size for piece in cut[:-1])


def test_pieces_have_the_tokens_of_the_whole(
    trained: PreTrainedTokenizerFast, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 100)
    text = "\n".join(documents)
    cut = list(pieces(text))
    engine = encoder(trained)
    assert len(cut) > 50
    assert [token for piece in cut for token in engine.encode(piece).ids] == engine.encode(text).ids


def test_load_tokenizer(prepared: Path) -> None:
    loaded = load_tokenizer(prepared)
    assert loaded.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(prepared / "tokenizer").get_vocab() == loaded.get_vocab()


def test_load_tokenizer_of_other_shards(prepared_copy: Path) -> None:
    other = train_tokenizer(["something else"], 300)
    other.save_pretrained(prepared_copy / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that made these shards"):
        load_tokenizer(prepared_copy)


def test_load_missing_tokenizer(prepared_copy: Path) -> None:
    (prepared_copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer has no tokenizer: name a tokenizer\.json or a folder"):
        load_tokenizer(prepared_copy)


def test_open_file_and_folder(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        opened = open_tokenizer(path)
        assert opened.eos_token == "<|endoftext|>"
        assert opened.get_vocab() == trained.get_vocab()


def test_open_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(UserError, match=r"has no tokenizer: name a tokenizer\.json or a folder with one"):
            open_tokenizer(path)


@pytest.mark.parametrize("as_folder", [False, True])
def test_open_what_is_no_tokenizer(as_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": "none"}))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer that can be read") as caught:
        open_tokenizer(tmp_path if as_folder else path)
    assert "\n" not in str(caught.value)


def test_open_without_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match="names no end-of-text token: name its eos_token"):
        open_tokenizer(path)
