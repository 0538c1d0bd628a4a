"""A comparison over the processes of torchrun: each run is trained by all of them, and the first one does the rest."""

from pathlib import Path

import pytest

from peerlm.cli import main
from peerlm_studies import processes as processes_module
from peerlm_studies.rows import read_rows

from ...processes import ranks
from .test_compare import RECIPE, forking, write_books


def compare(recipe: Path, *settings: str) -> None:
    """Be a rank of torchrun's, whose commands are forked."""
    processes_module.subprocess = forking()  # type: ignore[assignment]
    main(["compare", str(recipe), "--json", "-", *settings])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_books(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.mark.slow
def test_two_processes_make_the_rows_of_a_sharded_comparison_together(tmp_path: Path, recipe: Path) -> None:
    settings = ["parallel.rows=2", "budget.flops=5e7", "compare.evaluate=[]", "compare.sample=none"]
    with ranks(2, tmp_path / "ranks", compare, recipe, *[f"--set={each}" for each in settings]) as started:
        assert started.wait() == [0, 0], started.said()
    dense, peer = read_rows(tmp_path / "out" / "rows.jsonl")
    assert (dense["method"], peer["method"]) == ("dense", "peer")
    assert dense["summary"]["processes"] == peer["summary"]["processes"] == 2
    assert peer["config"]["parallel"]["rows"] == 2
    (log,) = (tmp_path / "out" / "runs").glob("peer*/log.jsonl")
    assert any(row.get("load") for row in read_rows(log))
    assert (tmp_path / "out" / "table.md").exists()
    first, second = started.said()
    assert '"label": "dense"' in first
    assert not second
