"""The documents: every relative link leads somewhere, and every file they name in code exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for path in ROOT.glob("docs/**/*.md") if path.name != "index.md"),
        *ROOT.glob("src/**/*.md"),
    ]
)
LINK = re.compile(r"\[[^\]]*\]\((?![a-z]+:)([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\s]+)`")
TREES = ("src/", "tests/", "docs/", "recipes/", "benchmarks/", "results/")


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative targets of Markdown links in a document of `folder` that do not exist."""
    return [target for target in LINK.findall(text) if not (folder / target).exists()]


def missing_files(text: str) -> list[str]:
    """Paths in code spans that begin with a folder of this repository and do not exist in it."""
    return [path for path in CODE.findall(text) if path.startswith(TREES) and not any(ROOT.glob(path.rstrip("/")))]


def test_dead_links_are_found_and_live_and_absolute_ones_pass() -> None:
    text = "[a](CHANGELOG.md) [b](#here) [c](https://example.org/x) [d](LICENSE#top) [e](gone.md)"
    assert dead_links(text, ROOT) == ["gone.md"]


def test_missing_files_are_found_and_patterns_pass() -> None:
    assert missing_files("`src/peerlm/*.py` `tests/` `src/gone.py` `PEER(dim=512)`") == ["src/gone.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_names_only_what_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert dead_links(text, document.parent) == []
    assert missing_files(text) == []
