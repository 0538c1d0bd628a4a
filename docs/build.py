"""Build the documentation site, `python docs/build.py`: no network, no requests from its pages, formulas as MathML."""

import html
import re
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', flags=re.DOTALL)
SHIM = re.compile(r'<script src="https://unpkg\.com/[^"]*"[^>]*></script>')
"""What lets the search run where pages are opened as files; it would be a request."""
DOCUMENT = re.compile(r"\]\(docs/")
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?!docs/)(?![a-z]+:)[^)]*\)")


def start_page(readme: str) -> str:
    """The README as the site's first page: links lead to pages of the site, and files outside of it are named only."""
    return DOCUMENT.sub("](", OUTSIDE.sub(r"\1", readme))


def with_math(page: str) -> str:
    """A page of HTML whose LaTeX, as arithmatex leaves it, is MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        latex = html.unescape(match[2] or match[3])
        return convert(latex, display="inline" if match[2] else "block")

    return MATH.sub(drawn, page)


def build(root: Path) -> None:
    """Write site/ of the checkout at `root`; ends with an error where a link or a docstring's name leads nowhere."""
    (root / "docs/index.md").write_text(start_page((root / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=root, check=True)
    (root / "site/build.py").unlink(missing_ok=True)  # what lies beside the pages is copied
    for page in (root / "site").rglob("*.html"):
        text = SHIM.sub("", page.read_text(encoding="utf-8"))
        page.write_text(with_math(text), encoding="utf-8")


if __name__ == "__main__":
    build(ROOT)
    print("open site/index.html; to search, serve it: python -m http.server --directory site")  # noqa: T201
