"""Reading text where the packages of the extra `data` are not installed."""

import re
import sys
from pathlib import Path

import pytest

from peerlm.data import prepare
from peerlm.errors import UserError


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("datasets", "pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_packages")
def test_text_and_jsonl_need_no_further_package(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(f"{i} green birds sat on a tree" for i in range(30)))
    (tmp_path / "b.jsonl").write_text("\n".join(f'{{"text": "{i} red birds fell off a tree"}}' for i in range(30)))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert prepare(files, tmp_path / "tokens", vocab_size=280, holdout=0.2, progress=False).vocab_size == 280


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.parquet", 'a.parquet: a parquet file needs pyarrow to be read: pip install "peerlm[data]"'),
        ("hf:roneneldan/TinyStories", "data set 'roneneldan/TinyStories' needs the package datasets to be read: pip "),
    ],
)
def test_other_sources_say_what_to_install(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=re.escape(message)):
        prepare([source], tmp_path / "tokens", vocab_size=280, progress=False)
