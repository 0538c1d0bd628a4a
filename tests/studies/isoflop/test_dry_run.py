"""A dry run states what each run takes, from a model without weights."""

from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm.train.build import new_model
from peerlm_studies.isoflop.dry_run import dry_run, dry_run_markdown
from peerlm_studies.isoflop.plan import load_isoflop


def test_figures_follow_from_the_model_and_the_gpu(study: Any) -> None:
    rows = dry_run(study.plan, gpu_tflops=2e-6, utilisation=0.5)
    assert len(rows) == 12
    for row, run in zip(rows, study.plan.runs(), strict=True):
        assert (row["method"], row["size"]) == (run.method, run.size)
        model = new_model(run.planned.train, vocab_size=300)
        assert row["total_parameters"] == sum(p.numel() for p in model.parameters())
        assert row["tokens"] == row["steps"] * 16 * 4
        assert row["gpu_hours"] == pytest.approx(row["flops"] / 1e6 / 3600, rel=0.02)  # whole steps, so a bit less
        state = 16 * row["total_parameters"]
        width = run.planned.train.model["hidden_size"]
        assert row["memory_gib"] * 2**30 == pytest.approx(state + 64 * (2 * 34 * 2 * width + 12 * 300), abs=1)
        rows_read = 2 * 8 * 2 * 4 * width if run.method == "PEER" else 0  # blocks, experts, u and v, bytes
        assert row["row_bytes"] == rows_read
    assert rows[-1]["size"] in dry_run_markdown(rows)


def test_part_of_the_study_alone(study: Any) -> None:
    rows = dry_run(study.plan, gpu_tflops=1, utilisation=1, methods=["PEER"], budgets=["4e9"])
    assert [row["size"] for row in rows] == ["small", "middle", "large"]


@pytest.mark.parametrize(
    ("tflops", "utilisation", "message"),
    [
        (0.0, 0.4, "--gpu-tflops 0 must be above 0"),
        (float("inf"), 0.4, "--gpu-tflops inf must be above 0"),
        (400.0, 0.0, "--utilisation 0 must be above 0"),
        (400.0, 40.0, "--utilisation 40 must be above 0 and at most 1"),
    ],
)
def test_figures_out_of_range_are_refused(study: Any, tflops: float, utilisation: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dry_run(study.plan, gpu_tflops=tflops, utilisation=utilisation)


def test_the_command_prints_a_table_and_names_a_model_that_cannot_be_built(
    study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["isoflop", str(study.path), "--dry-run"])
    assert end.value.code == 0
    assert "middle" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["isoflop", str(study.path), "--dry-run", "--set", "model.num_attention_heads=3"])
    assert end.value.code == 2
    assert "no model can be built from the recipe's [model]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["6e18", "2e19"])
def test_recipes_of_the_paper_read(name: str) -> None:
    plan = load_isoflop(Path(__file__).parents[3] / "recipes" / f"isoflop_paper_{name}.toml")
    rows = dry_run(plan, gpu_tflops=400, utilisation=0.4, sizes=["d512"])
    assert [row["method"] for row in rows] == ["dense", "expert-choice MoE", "PKM", "PEER"]
    assert rows[3]["total_parameters"] > 2 * 512 * 1024**2
    assert all(row["gpu_hours"] == pytest.approx(float(name) / 1.6e14 / 3600, rel=1e-3) for row in rows)


def test_the_recipe_for_larger_budgets_fits_one_gpu() -> None:
    plan = load_isoflop(Path(__file__).parents[3] / "recipes" / "isoflop_gpu.toml")
    rows = {row["method"]: row for row in dry_run(plan, gpu_tflops=400, utilisation=0.4, budgets=["1e16"])}
    assert [*rows][:3] == ["PEER", "PKM", "dense"]  # what is worth most
    assert max(row["memory_gib"] for row in rows.values()) < 80
    assert rows["PEER"]["total_parameters"] > 4 * 2 * 512**2 * 384
    assert rows["PEER of 1024²"]["row_bytes"] == rows["PEER"]["row_bytes"]
    for method in ("PEER", "PKM", "dense"):  # a table of bigrams costs nearly nothing
        assert 0.95 < rows[f"{method} with bigrams"]["tokens"] / rows[method]["tokens"] < 1
