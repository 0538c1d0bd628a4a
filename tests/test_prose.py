"""Documents, docstrings, messages and help use the field's words, for readers whose first language is not English."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    r"go(?:es)?\s+on\b(?!\s+a\b)|gone\s+on|went\s+on": "continue or resume",
    r"mend(?:s|ed|ing)?": "fix",
    r"loud(?:er|est|ness)?": "output scale",
    r"rivals?": "baseline",
    r"left\s+behind": "stale",
    r"shall": "will, must or can",
    r"for\s+ever": "always",
    r"(?:hold|holds|held)\s+still": "freeze",
}
"""Words that this project once used in a sense of its own, and the field's words for them."""
NAMES_OF_RUNS = {"docs/results.md", "docs/log.md"}
"""Made from rows, or a dated record: runs there keep the names that they had."""


def found(text: str) -> list[str]:
    """Each of the words that occurs, with the one to use."""
    hits = []
    for pattern, better in WORDS.items():
        hits += [f"{match[0]!r}: say {better}" for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]
    return hits


def readers_files() -> list[Path]:
    """What users read: documents, and sources with their docstrings, messages and help."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    files += [
        path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".cpp", ".h", ".inc", ".html", ".js")
    ]
    return [path for path in files if str(path.relative_to(ROOT)) not in NAMES_OF_RUNS]


def test_no_homemade_words() -> None:
    files = readers_files()
    assert len(files) > 100
    hits = {str(path.relative_to(ROOT)): found(path.read_text(encoding="utf-8")) for path in files}
    assert {name: words for name, words in hits.items() if words} == {}


def test_a_homemade_word_is_found_across_lines() -> None:
    assert found("A run goes\n    on, as loud as its rivals.") == [
        "'goes\\n    on': say continue or resume",
        "'loud': say output scale",
        "'rivals': say baseline",
    ]
