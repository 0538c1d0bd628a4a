"""Who may import whom, by the rows of docs/architecture.md, held over the syntax trees; and a caption in each file."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
FREE = {"peerlm.__init__", "peerlm.__main__"}
"""The doors of the package: names load on first use, from anywhere."""


def rows() -> list[list[set[str]]]:
    """The rows of docs/architecture.md: in each, groups of rooms; those of one group know nothing of each other."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```rows\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [[set(group.split(" | ")) for group in line.split(", ")] for line in block[1].strip().splitlines()]


def may_import() -> dict[str, set[str]]:
    """For each room the rooms that it may import: all above, those to its left in its row, and itself."""
    allowed: dict[str, set[str]] = {}
    seen: set[str] = set()
    for row in rows():
        for group in row:
            allowed |= {room: seen | {room} for room in group}
            seen = seen | group
    return allowed


@cache
def modules() -> dict[str, ast.Module]:
    """Every Python module of the distribution by its dotted name, parsed."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room(module: str) -> str:
    """The room that a module is in: the package or file below `peerlm`, or the other package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "peerlm" and len(parts) > 1 else parts[0]


def imported(tree: ast.Module) -> set[str]:
    """Modules of ours that a syntax tree imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = node.module == "peerlm"
            names |= {f"peerlm.{alias.name}" for alias in node.names} if within else {node.module}
    return {name for name in names if name.partition(".")[0] in ("peerlm", "peerlm_studies")}


def violations(trees: Mapping[str, ast.Module]) -> list[str]:
    """Imports that the rows do not allow, as sentences."""
    allowed = may_import()
    found = []
    for module, tree in trees.items():
        if module in FREE:
            continue
        for name in sorted(imported(tree)):
            target = room(name)
            if target not in allowed and target[:1] != "_":
                found.append(f"{module} imports {name}, which is in no row of docs/architecture.md")
            elif target[:1] != "_" and target not in allowed[room(module)]:
                found.append(f"{module} imports {name}")
    return found


def test_modules_import_only_what_stands_above_them() -> None:
    assert violations(modules()) == []


def test_every_room_stands_in_one_row() -> None:
    rooms = {room(module) for module in modules() if module not in FREE}
    named = [room for row in rows() for group in row for room in group]
    assert sorted(named) == sorted(set(named))
    assert rooms <= set(named)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("peerlm.ops.planted", "from peerlm.layers import PEER"),
        ("peerlm.layers.planted", "from peerlm.optim import RowAdamW"),
        ("peerlm.optim.planted", "def late():\n    import peerlm.layers.peer"),
        ("peerlm.train.planted", "from peerlm_studies.rows import read_rows"),
        ("peerlm.model.planted", "from peerlm import packs"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(module: str, code: str) -> None:
    assert violations({module: ast.parse(code)}) != []


def exported(package: str, tree: ast.Module) -> set[str]:
    """Names that a package's `__init__` takes out of its modules."""
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != package
        for alias in node.names
    }


def clashes(trees: Mapping[str, ast.Module]) -> list[str]:
    """Packages that export a name equal to one of their modules, which the name then hides."""
    found = []
    for module, tree in trees.items():
        package, _, last = module.rpartition(".")
        if last == "__init__":
            own = {
                name.removeprefix(f"{package}.").partition(".")[0] for name in trees if name.startswith(f"{package}.")
            }
            found += [f"{package}.{name}" for name in sorted(exported(package, tree) & own)]
    return found


def test_no_package_exports_a_name_of_one_of_its_modules() -> None:
    assert clashes(modules()) == []
    planted = {"a.__init__": ast.parse("from a.grow import grow"), "a.grow": ast.parse("")}
    assert clashes(planted) == ["a.grow"]


def caption(path: Path) -> str:
    """The first line of a file's docstring or first comment, where it is a whole sentence; otherwise nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        sign = "#" if path.name == "CMakeLists.txt" else "//"
        first = text.partition("\n")[0]
        first = first.removeprefix(sign).strip() if first.startswith(sign) else ""
    return first if first.endswith(".") else ""


def test_every_source_file_begins_with_a_caption() -> None:
    kinds = {".py", ".cpp", ".h", ".inc", ".js"}
    files = [path for path in SOURCES.rglob("*") if path.suffix in kinds or path.name == "CMakeLists.txt"]
    assert {path.suffix for path in files} == kinds | {".txt"}
    assert [str(path.relative_to(ROOT)) for path in files if not caption(path)] == []


def test_a_file_without_a_caption_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\n")
    (tmp_path / "b.cpp").write_text("#include <vector>\n")
    (tmp_path / "c.inc").write_text("// A caption that does not end\n// on its first line.\n")
    (tmp_path / "d.h").write_text("// What this holds.\n#pragma once\n")
    assert [caption(tmp_path / name) for name in ("a.py", "b.cpp", "c.inc", "d.h")] == ["", "", "", "What this holds."]
