"""Room on the disk: what a checkpoint takes is known before the first step, and too little is said."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm import PEER, UserError
from peerlm.data import TokenShards
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.ranks import Ranks
from peerlm.train import TrainConfig, train
from peerlm.train.build import build_model, build_optimizer
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.space import check_space, checkpoint_bytes

Configure = Callable[..., TrainConfig]
Usage = namedtuple("Usage", "total used free")


def layer() -> PEER:
    return PEER(16, num_experts=256, heads=2, experts_per_head=4, key_dim=8, query_norm="none")


@pytest.mark.parametrize(
    ("options", "moments"),
    [({}, 2.0), ({"row_wise": True}, 1.0), ({"betas": (0.0, 0.98)}, 1.0), ({"row_wise": True, "betas": (0, 0.98)}, 0)],
)
def test_bytes_are_those_of_weights_and_moments(options: dict[str, Any], moments: float) -> None:
    peer = layer()
    groups = parameter_groups(peer)
    for group in groups:
        group.update(options)
    optimizer = RowAdamW(groups, lr=1e-3)
    weights, checkpoint = checkpoint_bytes(optimizer)
    assert weights == 4 * sum(parameter.numel() for parameter in peer.parameters())
    assert checkpoint / weights == pytest.approx(1 + moments, rel=0.15)  # a row has two steps, too
    adamw = torch.optim.AdamW(peer.parameters())
    assert checkpoint_bytes(adamw) == (weights, 3 * weights)


ROWS = {"num_experts": 1024, "heads": 2, "experts_per_head": 2, "key_dim": 8}
IN_PLACE = {"table_clip": float("inf"), "table_beta1": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"peer": {**ROWS, "row_format": "bfloat16"}}, "optim": {"table_beta1": 0.0}},
        {
            "model": {"peer": {**ROWS, "row_format": "int8"}},
            "optim": IN_PLACE,
            "data": {"micro_batch_size": None},
        },
    ],
    ids=["float32", "bfloat16", "int8"],
)
def test_a_checkpoint_takes_about_what_was_foreseen(configure: Configure, changes: dict[str, Any]) -> None:
    config = configure(**changes)
    train(config, progress=False)
    (newest, *_) = list_checkpoints(Path(config.run))[::-1]
    found = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    model = build_model(config, TokenShards(config.data.folder, "train"), ranks.device)
    _, foreseen = checkpoint_bytes(build_optimizer(model, config, ranks))
    assert foreseen == pytest.approx(found, rel=0.3 if not changes else 0.1)


def test_too_little_is_refused_and_little_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(layer().parameters())
    weights, checkpoint = checkpoint_bytes(optimizer)
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, free) if Path(path).is_dir() else 1 / 0)
    said: list[str] = []
    folder = tmp_path / "runs" / "new"
    with pytest.raises(UserError, match=r"new has 0 B free, and one checkpoint takes about .* KiB: free some space"):
        check_space(folder, optimizer, checkpoints=3, warn=said.append)
    free = 3 * checkpoint + weights - 1
    check_space(folder, optimizer, checkpoints=3, warn=said.append)
    assert "3 checkpoints with the model take about" in said.pop()
    free += 1
    check_space(folder, optimizer, checkpoints=3, warn=said.append)
    assert said == []


def test_a_run_without_room_does_not_begin(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 100))
    with pytest.raises(UserError, match="has 100 B free, and one checkpoint takes about"):
        train(config, progress=False)
    assert not Path(config.run).exists()
