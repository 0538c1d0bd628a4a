"""Shards: what is damaged says so when it is opened."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerlm.data import Manifest, TokenShards
from peerlm.errors import UserError


def test_ranges_are_checked(prepared: Path) -> None:
    shards = TokenShards(prepared, "train")
    assert shards.tokens(5, 5).shape == (0,)
    assert shards.tokens(0, 3).dtype == np.uint16
    assert shards.tokens(shards.num_tokens, shards.num_tokens).shape == (0,)
    for start, stop in [(-1, 2), (3, 2), (0, shards.num_tokens + 1)]:
        with pytest.raises(IndexError, match="do not lie within"):
            shards.tokens(start, stop)


def test_tokens_are_a_copy(prepared: Path) -> None:
    shards = TokenShards(prepared, "train")
    before = shards.tokens(0, 9)
    shards.tokens(0, 9)[:] = 0
    assert shards.tokens(0, 9).tolist() == before.tolist()


def test_pickle_carries_no_tokens(prepared: Path) -> None:
    shards = TokenShards(prepared, "heldout")
    data = pickle.dumps(shards)
    assert len(data) < 500
    assert pickle.loads(data).tokens(0, 50).tolist() == shards.tokens(0, 50).tolist()


def test_unknown_split(prepared: Path) -> None:
    with pytest.raises(UserError, match="there is no split 'test': choose one of train, heldout"):
        TokenShards(prepared, "test")


def test_truncated_shard(prepared_copy: Path) -> None:
    path = prepared_copy / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00001\.bin has 998 bytes, not the 1000 .*: prepare the folder"):
        TokenShards(prepared_copy, "train")
    TokenShards(prepared_copy, "heldout")


def test_missing_files(prepared_copy: Path) -> None:
    (prepared_copy / "train-00000.bin").unlink()
    (prepared_copy / "heldout-ends.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing: prepare the folder again or restore"):
        TokenShards(prepared_copy, "train")
    with pytest.raises(UserError, match=r"heldout-ends\.bin is missing"):
        TokenShards(prepared_copy, "heldout")


def test_changed_content_is_found_by_verify(prepared_copy: Path) -> None:
    path = prepared_copy / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    TokenShards(prepared_copy, "train")
    TokenShards(prepared_copy, "heldout", verify=True)
    with pytest.raises(UserError, match=r"train-00001\.bin does not have the hash that the manifest says"):
        TokenShards(prepared_copy, "train", verify=True)


def test_no_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no prepared data \(no manifest.json\): run `peerlm prepare`"):
            TokenShards(folder, "train")


def test_manifest_round_trip(prepared: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(prepared)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "KeyError: 'format'": lambda fields: fields.pop("format"),
    "KeyError: 'splits'": lambda fields: fields.pop("splits"),
    "TypeError: .*vocab_size": lambda fields: fields.pop("vocab_size"),
    "TypeError: .*surprise": lambda fields: fields.update(surprise=1),
    r"splits are \('train',\)": lambda fields: fields["splits"].pop("heldout"),
    "dtype is 'f8'": lambda fields: fields.update(dtype="f8"),
    "files of split 'train' do not add up": lambda fields: fields["splits"]["train"].update(tokens=1),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_corrupt_manifest(reason: str, prepared_copy: Path) -> None:
    path = prepared_copy / "manifest.json"
    fields = json.loads(path.read_text())
    CHANGES[reason](fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"manifest\.json is corrupt \(.*{reason}.*\): delete the folder"):
        Manifest.read(prepared_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_manifest_that_is_no_manifest(content: bytes, prepared_copy: Path) -> None:
    (prepared_copy / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is corrupt"):
        Manifest.read(prepared_copy)


def test_manifest_of_another_format(prepared_copy: Path) -> None:
    (prepared_copy / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has format 99, this version reads 1 and 2: prepare the folder again"):
        Manifest.read(prepared_copy)
