"""Who may know whom around `ops/`, read off the syntax trees; and each rule fails where it is broken."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import peerlm
from peerlm.ops import api

PACKAGE = Path(peerlm.__file__).parent
API = "peerlm.ops.api"
PUBLIC = {
    "api",
    "attention_step",
    "compiled",
    "functions",
    "grouped_products",
    "operators",
    "padded_rows",
    "pairing",
    "row_formats",
    "row_keeping",
    "row_shards",
    "row_updates",
    "scoring",
    "tensor_files",
    "tensors",
    "watched",
    "whole_layer",
}
"""Modules of `ops` that the rest of the package may import."""
MAY_COMPARE = {"peerlm.testing"}


def sources() -> dict[str, str]:
    """The text of every module of the package, by its dotted name."""
    files = {path.relative_to(PACKAGE.parent).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path.read_text("utf-8") for parts, path in files.items()}


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def backend_of(module: str) -> str | None:
    """The backend that a module belongs to by the table: the module of an entry, or its package."""
    for paths in api._BACKENDS.values():
        own = paths[0]
        package = own.rpartition(".")[0]
        if module == own or (package != "peerlm.ops" and (module == package or module.startswith(f"{package}."))):
            return own
    return None


def strangers_in_ops(modules: Mapping[str, str]) -> set[tuple[str, str]]:
    """Imports of what is private to `ops` by modules outside: backends, the reference among them."""
    return {
        (module, name)
        for module, source in modules.items()
        if not module.startswith("peerlm.ops") and module not in MAY_COMPARE
        for name in imported(source)
        if name.startswith("peerlm.ops.") and name.split(".")[2] not in PUBLIC
    }


def backends_that_know_another(modules: Mapping[str, str]) -> set[tuple[str, str]]:
    """Imports of a backend's module by another backend's."""
    return {
        (module, name)
        for module, source in modules.items()
        if (own := backend_of(module)) is not None
        for name in imported(source)
        if backend_of(name) not in (None, own)
    }


def names_outside_the_table(source: str) -> set[str]:
    """Backends' names in the code of `api.py`, as text or identifiers, outside its table; docstrings are free."""
    tree = ast.parse(source)
    tables = [n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "_BACKENDS"]
    assert len(tables) == 1
    free = {id(node) for node in ast.walk(tables[0])}
    free |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in free:
            continue
        words: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.replace(".", " ").replace("'", " ").split()
        elif isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.alias):
            words = node.name.split(".")
        found |= {word for word in words if word in api._BACKENDS}
    return found


def test_no_module_outside_ops_imports_a_backend() -> None:
    assert strangers_in_ops(sources()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from peerlm.ops.reference import mix_experts",
        "from peerlm.ops import reference",
        "import peerlm.ops.cpu.native",
    ],
)
def test_a_stranger_is_found(line: str) -> None:
    assert strangers_in_ops({"peerlm.layers.peer": f"def f():\n    {line}\n"}) != set()
    assert strangers_in_ops({"peerlm.testing": line, "peerlm.ops.bag": line}) == set()
    assert strangers_in_ops({"peerlm.layers.peer": "from peerlm.ops import api"}) == set()


def test_no_backend_imports_another() -> None:
    assert {backend_of(module) for module in sources()} >= {paths[0] for paths in api._BACKENDS.values()}
    assert backends_that_know_another(sources()) == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("peerlm.ops.bag", "from peerlm.ops.reference import ACTIVATIONS"),
        ("peerlm.ops.cpu.rows", "from peerlm.ops import reference"),
        ("peerlm.ops.reference", "from peerlm.ops.cpu import native"),
    ],
)
def test_a_backend_that_knows_another_is_found(module: str, line: str) -> None:
    assert backends_that_know_another({module: line}) != set()
    assert backends_that_know_another({module: "from peerlm.ops import functions, operators"}) == set()


def test_api_names_backends_in_its_table_alone() -> None:
    assert names_outside_the_table(sources()[API]) == set()


@pytest.mark.parametrize(
    "line",
    [
        "if tensor.device.type == 'cpu': pass",
        "from peerlm.ops import bag",
        "raise ValueError(\"backend 'bag' cannot\")",
    ],
)
def test_a_name_outside_the_table_is_found(line: str) -> None:
    assert names_outside_the_table(sources()[API] + f"\n\ndef planted(tensor):\n    {line}\n") != set()
