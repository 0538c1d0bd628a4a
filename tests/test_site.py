"""The documentation site: it builds, every document is in it, formulas are drawn, and pages ask nobody for anything."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("zensical", reason="the site needs Python 3.11 or newer")

ROOT = Path(__file__).parents[1]
REQUEST = re.compile(r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?(?:https?:)?//")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """docs/build.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of a copy of the documents."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("index.md"))
    for name in ("README.md", "zensical.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "src").symlink_to(ROOT / "src")
    builder.build(folder)
    return folder / "site"


def test_every_document_is_a_page_and_in_the_navigation(site: Path) -> None:
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")} | {Path("index.md")}
    assert [path for path in documents if not (site / path.with_suffix(".html")).is_file()] == []
    nav = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'"([a-z/]+\.md)"', nav)) == {path.as_posix() for path in documents}


def test_pages_make_no_requests(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if REQUEST.search(page.read_text(encoding="utf-8"))] == []
    assert REQUEST.search('<script src="https://example.org/x.js">')


def test_formulas_are_drawn(site: Path) -> None:
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20
    assert "\\(" not in page
    assert "arithmatex" not in page


def test_the_reference_has_docstrings_and_signatures(site: Path) -> None:
    page = (site / "reference/layers.html").read_text(encoding="utf-8")
    assert "Parameter Efficient Expert Retrieval" in page
    assert "experts_per_head" in page


def test_links_of_the_start_page_lead_within_the_site(builder: ModuleType) -> None:
    page = builder.start_page("[a](docs/a.md) [b](https://example.org) [c](CHANGELOG.md) ![d](docs/d.svg)")
    assert page == "[a](a.md) [b](https://example.org) c ![d](d.svg)"


def test_formulas_become_mathml(builder: ModuleType) -> None:
    page = builder.with_math('<p><span class="arithmatex">\\(a &lt; b\\)</span></p>')
    assert "<math" in page
    assert "<mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>" in page
    assert "\\(" not in page
