"""The installed package: what importing it costs, its public names, version, and embedded corpus."""

import ast
import hashlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import peerlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parent.parent
FOLDERS = ["src", "tests", "benchmarks", "examples", "docs"]
COMES_WITH = {"h11": "uvicorn", "pydantic-core": "pydantic"}
"""Packages that another one, which is declared, always brings at the version that it needs."""


@cache
def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has imported after running `code`."""
    code += "; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("code", ["import peerlm", "from peerlm import PEER", "import peerlm.cli"])
def test_import_needs_no_library_of_models_or_data(code: str) -> None:
    assert not modules_after(code) & {"transformers", "datasets", "matplotlib", "tensorboard", "pyarrow"}


def test_importing_the_layer_loads_torch() -> None:
    assert "torch" not in modules_after("import peerlm")
    assert "torch" in modules_after("from peerlm import PEER")


def test_importing_the_layer_loads_no_compiler() -> None:
    assert "torch._dynamo" not in modules_after("from peerlm import PEER")


@pytest.mark.parametrize("name", peerlm.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(peerlm, name) is not None
    assert name in dir(peerlm)


def test_unknown_name_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'PERR'; it has PEER, "):
        _ = peerlm.PERR


def test_layer_from_the_package_computes() -> None:
    x = torch.randn(2, 3, 8)
    assert peerlm.PEER(8, num_experts=16, heads=2, experts_per_head=2, key_dim=4)(x).shape == x.shape


def test_version_is_that_of_the_installed_distribution() -> None:
    assert peerlm.__version__ == importlib.metadata.version("peerlm")


def test_corpus_is_in_the_package_with_the_hash_that_its_readme_states() -> None:
    folder = importlib.resources.files("peerlm") / "corpus"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\b[0-9a-f]{64}\b", readme)
    assert stated is not None
    assert hashlib.sha256((folder / "demo_corpus.txt.xz").read_bytes()).hexdigest() == stated[0]


def test_package_declares_its_types() -> None:
    assert (importlib.resources.files("peerlm") / "py.typed").is_file()


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """Each import of a folder's sources that is not of this repository: the file and the top-level package."""
    own = {path.stem for kept in FOLDERS for path in (REPOSITORY / kept).rglob("*.py")} | {"peerlm", "peerlm_studies"}
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                package = name.partition(".")[0]
                if package not in own and package not in sys.stdlib_module_names:
                    yield str(path.relative_to(REPOSITORY)), package


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_declared_and_does_not_come_by_chance(folder: str) -> None:
    def plain(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;! ]", requirement)[0]).lower()

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {plain(line) for lines in [project["dependencies"], *extras.values()] for line in lines}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        (path, package)
        for path, package in imported(folder)
        if not {plain(name) for name in distributions.get(package, [package])}
        & {*declared, *(brought for brought, by in COMES_WITH.items() if by in declared)}
    }
    assert not missing
