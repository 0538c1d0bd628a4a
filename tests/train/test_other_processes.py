"""A run resumes over other processes, whose optimizer keeps of tables what the one before kept otherwise."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm.cli import main
from peerlm.files import write_json
from peerlm.train import TrainConfig, build
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.recipe import to_dict

from ..processes import ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "copies": (2, {}),
    "shards": (2, {"parallel": {"rows": 2}}),
}
"""How many processes, and what the recipe says of them. Copies update whole tables, the others do so by rows."""
UNMIXED = {
    "attention_dropout": 0.0,
    "peer": {"num_experts": 64, "heads": 2, "experts_per_head": 2, "key_dim": 8, "query_norm": "none"},
}
"""A model that computes the same over any processes, but for rounding."""


def resume(recipe: Path) -> None:
    build._rows_pay = lambda *arguments: True  # type: ignore[assignment]
    main(["train", str(recipe), "--json", "-", "--resume=auto"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [("one process", "copies"), ("copies", "one process"), ("copies", "shards"), ("shards", "copies")],
)
def test_the_other_kind_of_optimizer_resumes(
    first: str, then: str, configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    def train(layout: str, run: Path) -> dict[str, torch.Tensor]:
        count, settings = LAYOUTS[layout]
        config = configure(run=str(run), model=UNMIXED, data={"micro_batch_size": None}, eval={"every": 0}, **settings)
        write_json(tmp_path / "recipe.json", to_dict(config))
        with ranks(count, tmp_path / layout, resume, tmp_path / "recipe.json") as processes:
            assert processes.wait() == [0] * count, processes.said()
        files = sorted((run / "model").glob("*.safetensors"))  # of shards several
        return {name: value for file in files for name, value in load_file(file).items()}

    expected = train(first, tmp_path / "run")
    for path in (tmp_path / "run/model", list_checkpoints(tmp_path / "run")[-1]):
        shutil.rmtree(path)
    (tmp_path / "run/summary.json").unlink()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000006"]
    found = train(then, tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
