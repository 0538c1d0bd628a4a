"""A tiny prepared corpus: 40 documents of several scripts, in shards so short that documents span them."""

import random
import shutil
from pathlib import Path

import pytest

from peerlm.data import prepare

SENTENCE = "the quick brown fox jumps over lazy dogs, naïve Straße Москва 東京 🦊 1,024 don't end.\n\n  x"


def make_documents(count: int = 40) -> list[str]:
    generator = random.Random(0)
    return [
        f"Document {number}. " + " ".join(generator.choices(SENTENCE.split(" "), k=30)).strip()
        for number in range(count)
    ]


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def documents() -> list[str]:
    return make_documents()


@pytest.fixture
def text_file(tmp_path: Path, documents: list[str]) -> Path:
    return write_text(tmp_path / "text.txt", documents)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to; `prepared_copy` is for that."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_text(folder / "text.txt", make_documents())
    prepare([source], folder / "out", vocab_size=300, holdout=0.2, shard_tokens=500, progress=False)
    return folder / "out"


@pytest.fixture
def prepared_copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))
