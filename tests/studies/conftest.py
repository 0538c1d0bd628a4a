"""A small isoFLOP recipe, and rows that a known law of loss would give for it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peerlm_studies.comparison import make_rows
from peerlm_studies.comparison.plan import CompareConfig, PlannedRun
from peerlm_studies.isoflop.plan import IsoflopPlan, load_isoflop

from .recipes import DATA

RECIPE = (
    DATA
    + """[model]
num_hidden_layers = 2
num_attention_heads = 2
[compare]
evaluate = ["{folder}/other.txt"]
[isoflop]
optimum_seeds = [1, 2]
[isoflop.sizes]
small = {{ "model.hidden_size" = 16 }}
middle = {{ "model.hidden_size" = 32 }}
large = {{ "model.hidden_size" = 64 }}
[isoflop.budgets]
"1e9" = ["small", "middle", "large"]
"4e9" = ["small", "middle", "large"]
[methods.dense.model]
ffw_layers = "dense"
[methods.PEER.model]
ffw_layers = "peer"
peer = {{ num_experts = 64, heads = 2, experts_per_head = 4, key_dim = 8 }}
"""
)
SIZES = {16: 1e6, 32: 2e6, 64: 4e6}
"""By hidden_size, the active parameters that rows state."""


def loss_of(method: str, flops: float, hidden_size: int, seed: int) -> float:
    """PEER is 0.1 better; the optimum is at 2e6 parameters for 1e9 FLOPs and at sqrt(8)e6 for 4e9; seeds move 0.01."""
    optimum = 2e6 * math.sqrt(flops / 1e9) ** 0.5
    base = 5.0 - 0.3 * math.log(flops / 1e9) - 0.1 * (method == "PEER")
    return base + 0.2 * math.log(SIZES[hidden_size] / optimum) ** 2 + 0.01 * seed


def row_of(run: PlannedRun, compare: CompareConfig) -> dict[str, Any]:
    """The row that training would append, of a law."""
    flops, size = run.train.budget.flops, run.train.model["hidden_size"]
    assert flops is not None
    loss = loss_of(run.method, flops, size, run.seed)
    seconds = flops / 1e8 * (2 if run.method == "PEER" else 1)
    return {
        "key": run.key(compare),
        "method": run.method,
        "label": run.label,
        "seed": run.seed,
        "sweep": run.sweep,
        "config": {"eval": {"windows": 4, "final_windows": 4}},
        "summary": {
            "validation_loss": loss,
            "active_parameters": int(SIZES[size]),
            "total_parameters": int(3 * SIZES[size]),
            "tokens": 1000,
            "flops": flops,
            "seconds": 3 * seconds,
            "tokens_per_second": 100.0,
            "peak_memory_bytes": 2**20,
            "cpu_seconds": 2 * seconds,
            "threads": 2,
            "device": "cpu",
            "usage": {},
        },
        "evaluation": {"other": {"perplexity": math.exp(loss + 1)}},
        "curve": [{"tokens": 1000, "flops": flops, "seconds": seconds, "validation_loss": loss}],
        "machine": {"processor": "x86_64", "cores": 2, "python": "3.11", "torch": "2.13.0"},
        "date": "2026-01-02",
    }


@dataclass(frozen=True)
class Study:
    """The recipe in a folder, and what its rows would be."""

    path: Path

    @property
    def plan(self) -> IsoflopPlan:
        return load_isoflop(self.path)

    def rows(self, seeds: list[int]) -> list[dict[str, Any]]:
        """The row of every run with these seeds."""
        plan = self.plan
        return [row_of(run.planned, plan.compare) for run in plan.runs(seeds)]

    def row_of(self, run: PlannedRun, compare: CompareConfig) -> dict[str, Any]:
        return row_of(run, compare)

    def loss_of(self, method: str, flops: float, hidden_size: int, seed: int) -> float:
        return loss_of(method, flops, hidden_size, seed)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "other.txt").write_text("some text")
    path = tmp_path / "isoflop.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return Study(path)


@pytest.fixture
def made(study: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are made, by label and seed; each row is what the study's law says."""
    labels: list[str] = []

    def make(run: Any, compare: Any, *others: object) -> dict[str, Any]:
        labels.append(f"{run.label} {run.seed}")
        return study.row_of(run, compare)

    monkeypatch.setattr(make_rows, "_make_row", make)
    monkeypatch.setattr(make_rows, "prepare_data", lambda data, progress: None)
    return labels
