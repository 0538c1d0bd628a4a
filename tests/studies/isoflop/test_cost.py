"""What models cost to run is measured once, and activation memory is what a backward pass needs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm import UserError
from peerlm_studies.isoflop import cost
from peerlm_studies.isoflop.cost import activation_bytes, draw_tokens, measure_costs
from peerlm_studies.rows import read_rows


class Squares(nn.Module):
    """Keeps the ids, and the product once though two operations need it; parameters are no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.factor = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        x = self.embedding(input_ids)
        return SimpleNamespace(loss=(x * self.factor).sum() + x.pow(3).sum())


def test_activations_are_counted_once_and_parameters_not() -> None:
    ids = torch.zeros(3, 5, dtype=torch.int64)
    assert activation_bytes(Squares(), ids) == ids.numel() * (8 + 4 * 8)


def test_tokens_are_as_frequent_as_words() -> None:
    torch.manual_seed(0)
    ids = draw_tokens(64, 256, 100)
    assert ids.shape == (64, 256)
    counts = torch.bincount(ids.flatten(), minlength=100)
    for rank in (2, 5, 10):
        assert counts[rank - 1].item() == pytest.approx(counts[0].item() / rank, rel=0.2)


def test_rows_are_measured_once(study: Any, tmp_path: Path) -> None:
    output = tmp_path / "cost.jsonl"
    options: dict[str, Any] = {"batch_sizes": (1, 4), "sizes": ["small"], "rounds": 1}
    lines: list[str] = []
    rows = measure_costs(study.path, output, **options, report=lines.append)
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        ("dense", 1),
        ("dense", 4),
        ("PEER", 1),
        ("PEER", 4),
    ]
    assert len(lines) == 4
    assert read_rows(output) == rows
    for one, four in (rows[:2], rows[2:]):
        assert 2 * one["activation_bytes"] < four["activation_bytes"] < 5 * one["activation_bytes"]
        for name in ("train_seconds", "prefill_seconds", "decode_seconds"):
            assert one[name] > 0
        assert one["train_seconds"] > one["prefill_seconds"]
        assert one["total_parameters"] == four["total_parameters"] >= one["active_parameters"]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    again = measure_costs(study.path, output, **options, report=lines.append)
    assert len(lines) == 5
    assert [(row["method"], row["batch_size"]) for row in again[-1:]] == [("dense", 1)]
    assert again[:3] == rows[1:]


def test_products_have_the_recipes_precision(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[bool]] = {"fp32": set(), "bf16": set()}
    accumulate = cost.accumulate_gradients
    for precision, found in seen.items():

        def watched(model: Any, batch: Tensor, *, autocast: Any, found: set[bool] = found, **options: Any) -> Tensor:
            with autocast():
                found.add(torch.is_autocast_enabled("cpu"))
            return accumulate(model, batch, autocast=autocast, **options)

        monkeypatch.setattr(cost, "accumulate_gradients", watched)
        options: dict[str, Any] = {"batch_sizes": (1,), "sizes": ["small"], "rounds": 1}
        measure_costs(study.path, tmp_path / precision, settings=[f'precision="{precision}"'], **options)
    assert seen == {"fp32": {False}, "bf16": {True}}


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_what_is_not_measured_is_refused(name: str, study: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"has {name} = true, which is not measured here: set it to false"):
        measure_costs(study.path, tmp_path / "cost.jsonl", settings=[f"{name}=true"])
