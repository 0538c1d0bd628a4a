"""Who may touch rows: rules over the syntax trees of the sources, and violations that they must find."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
FILES = {path.relative_to(SOURCES).as_posix(): path for path in sorted(SOURCES.rglob("*.py"))}

SAID_TO_OPTIMIZERS = {"prepare_rows", "wants_row_gradients"}
RESULTS = {"config", "group", "inputs", "p", "parallel", "point", "section", "self", "shape"}
"""Names of what has other rows: lines of results, arguments of an operation."""
LOOK_UPS = {"get_buffer", "get_parameter", "getattr", "setattr"}


def talks_to_optimizers(tree: ast.AST) -> Iterator[int]:
    """Lines that name what a table says to the optimizer that watches it."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [getattr(node, "id", ""), getattr(node, "attr", "")]
        if SAID_TO_OPTIMIZERS.intersection(names):
            yield node.lineno


def reads_raw_rows(tree: ast.AST) -> Iterator[int]:
    """Lines that reach for the tensors of a table, `.rows` and `.scales`, as attributes or by name."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("rows", "scales") and id(node) not in called:
            if not (isinstance(node.value, ast.Name) and node.value.id in RESULTS):
                yield node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in LOOK_UPS:
            words = [each.value for each in node.args if isinstance(each, ast.Constant)]
            if any(str(word).split(".")[-1] in ("rows", "scales") for word in words):
                yield node.lineno


Rule = tuple[Callable[[ast.AST], Iterator[int]], tuple[str, ...]]
RULES: dict[str, Rule] = {
    "only tables talk to optimizers": (talks_to_optimizers, ("peerlm/ops/", "peerlm/layers/table.py")),
    "rows are read through tables": (
        reads_raw_rows,
        ("peerlm/ops/", "peerlm/layers/", "peerlm/optim/", "peerlm/parallel/"),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_sources_keep_the_rule(rule: str) -> None:
    finds, exempt = RULES[rule]
    assert len(FILES) > 100
    found = [
        f"{name}:{line}"
        for name, path in FILES.items()
        if not name.startswith(exempt)
        for line in finds(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "violation"),
    [
        ("only tables talk to optimizers", "from peerlm.ops.row_updates import prepare_rows"),
        ("only tables talk to optimizers", "row_updates.prepare_rows(pack, None)"),
        ("only tables talk to optimizers", "y = mix(x, row_gradients=wants_row_gradients(rows))"),
        ("rows are read through tables", "norms = layer.experts.rows.norm(dim=-1)"),
        ("rows are read through tables", "values = self.layer.values.rows[ids]"),
        ("rows are read through tables", "experts.rows.copy_(other)"),
        ("rows are read through tables", "wide = rows * table.scales[..., None]"),
        ("rows are read through tables", 'rows = getattr(owner, "rows")'),
        ("rows are read through tables", 'rows = model.get_parameter("model.layers.0.ffw.experts.rows")'),
    ],
)
def test_a_violation_is_found(rule: str, violation: str) -> None:
    finds, _ = RULES[rule]
    assert list(finds(ast.parse(f"import torch\n\n{violation}"))) == [3]
    assert list(finds(ast.parse("rows = layer.rows()\nnumber = config.rows[0]"))) == []
