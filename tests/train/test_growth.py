"""Layers grow within a run: when, what it costs, and that a resumed run ends with the same weights."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm.cli import main
from peerlm.errors import UserError
from peerlm.model import PeerForCausalLM
from peerlm.train import TrainConfig, train
from peerlm.train.budget import Budget
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import GrowConfig
from peerlm.train.growth import opening_at, read_growths
from peerlm.train.recipe import bound_values

AT = "10@25%,12@0.6"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_layers_grow_at_their_shares_of_the_budget(configure: Callable[..., TrainConfig]) -> None:
    result = train(configure(budget={"steps": 20}, grow={"at": AT, "opening": 0.2}), progress=False)
    grown = [(row["step"], row["grown_to"]) for row in rows(result.run) if "grown_to" in row]
    assert grown == [(5, 100), (12, 144)]
    model = PeerForCausalLM.from_pretrained(result.run / "model")
    assert model.config.peer["num_experts"] == 144
    assert model.config.peer["pairing"] == "shells"
    assert "grown_from" not in model.config.peer
    table = weights(result.run)["model.layers.1.ffw.experts.rows"]
    assert table.shape[0] == 144
    assert all(part[:, 1].count_nonzero() for part in (table[64:100], table[100:]))  # they have learned
    assert result.summary["steps"] == 20


def test_a_budget_of_flops_is_spent_whole(configure: Callable[..., TrainConfig]) -> None:
    result = train(configure(budget={"flops": 3e8}, grow={"at": "16@50%"}, checkpoint={"every": 0}), progress=False)
    assert 0.97 * 3e8 < result.summary["flops"] <= 3e8
    flops = [row["flops"] for row in rows(result.run) if "grown_to" in row]
    assert flops[0] == pytest.approx(1.5e8, rel=0.03)


@pytest.mark.parametrize(
    ("tables", "keys", "freeze"),
    [
        ("exact", "crowded", ["rows", "keys"]),
        ("exact", "data", []),
        ("lazy", "crowded", ["rows"]),
        ("dense", "random", ["rest"]),
        ("fused", "random", []),
    ],
)
def test_a_run_resumed_at_any_checkpoint_ends_with_the_same_weights(
    tables: str, keys: str, freeze: list[str], configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    fused = tables == "fused"
    changes: dict[str, Any] = {
        "budget": {"steps": 12},
        "grow": {"at": AT, "opening": 0.3, "keys": keys, "freeze": freeze},
        "optim": {"tables": tables, "table_clip": math.inf if fused else 1.0},
        "data": {"micro_batch_size": None if fused else 2},
        "checkpoint": {"every": 2, "keep": 99},
    }
    straight = train(configure(**changes), progress=False).run
    for checkpoint in list_checkpoints(straight)[:-1]:
        again = tmp_path / f"from-{checkpoint.name}"
        copytree(straight, again)
        for name in ("model", "checkpoints"):
            rmtree(again / name)
        (again / "summary.json").unlink()
        copytree(checkpoint, again / "checkpoints" / checkpoint.name)
        train(configure(**changes, run=str(again)), resume=True, progress=False)
        expected, found = weights(straight), weights(again)
        assert all(torch.equal(expected[name], found[name]) for name in expected | found), checkpoint.name
        assert [row.get("loss") for row in rows(again)] == [row.get("loss") for row in rows(straight)]


def test_what_a_run_freezes_keeps_its_bits(configure: Callable[..., TrainConfig]) -> None:
    changes = {"grow": {"at": "12@50%", "freeze": ["rows", "keys", "query", "rest"]}, "checkpoint": {"every": 4}}
    run = train(configure(budget={"steps": 8}, **changes), progress=False).run
    before = load_file(list_checkpoints(run)[0] / "model.safetensors")
    after = weights(run)
    for name, value in before.items():
        kept = after[name][: len(value)] if name.endswith("rows") else after[name]
        kept = kept[:, :, :8] if name.endswith("sub_keys") else kept
        assert torch.equal(kept, value), name
    assert after["model.layers.1.ffw.experts.rows"][64:, 1].count_nonzero()


def test_the_command_takes_the_growth(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    config = configure(budget={"steps": 4})
    run = train(config, progress=False).run
    recipe.write_text((run / "config.json").read_text())
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe), "--output", str(tmp_path / "grown"), "--grow", "10@50%", "--json=-"])
    assert not end.value.code
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["grow"]["at"] == "10@50%"


def test_growth_binds_only_a_run_that_grows(configure: Callable[..., TrainConfig]) -> None:
    plain = bound_values(configure())
    assert not [key for key in plain if key.startswith("grow")]
    assert bound_values(configure(grow={"keys": "data"})) == plain
    assert bound_values(configure(grow={"at": AT}))["grow.at"] == AT


def test_the_opening_rises_to_one() -> None:
    config = GrowConfig(at="256@50%,512@75%", opening=0.1)
    growths = read_growths(config)
    assert [(growth.sub_keys, growth.share) for growth in growths] == [(256, 0.5), (512, 0.75)]
    assert opening_at(config, growths, 0, 0.3) == 1
    found = [opening_at(config, growths, 1, progress) for progress in (0.5, 0.525, 0.6, 0.7)]
    assert found == pytest.approx([0, 0.25, 1, 1])
    assert opening_at(config, growths, 2, 0.8) == pytest.approx(0.5)
    assert opening_at(GrowConfig(at="9@50%", opening=0), growths, 1, 0.5) == 1


@pytest.mark.parametrize("at", ["10@40%,12@70%", "12@70%"])
def test_experts_are_open_when_the_next_come_and_in_the_end(at: str, configure: Callable[..., TrainConfig]) -> None:
    """Shares of which, rounded, less than 0.3 lies between."""
    run = train(configure(budget={"steps": 10}, grow={"at": at, "opening": 0.3}), progress=False).run
    assert "grown_from" not in PeerForCausalLM.from_pretrained(run / "model").config.peer


def test_two_growths_may_be_due_after_one_step(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "changes_due", lambda self, step, seconds: 2 * (step >= 5))
    config = configure(budget={"steps": 8}, grow={"at": AT, "opening": 0.3, "freeze": ["rows"]})
    run = train(config, progress=False).run
    assert [(row["step"], row["grown_to"]) for row in rows(run) if "grown_to" in row] == [(5, 100), (5, 144)]


def test_a_run_that_ends_before_its_last_opening_opens(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "next_progress", lambda self, step, seconds: 0.6)  # too low, as before a slow step
    run = train(configure(budget={"steps": 4}, grow={"at": "12@50%", "opening": 0.3}), progress=False).run
    assert "grown_from" not in PeerForCausalLM.from_pretrained(run / "model").config.peer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grow": {"at": "256"}}, "grow.at = '256': '256' is not SUB_KEYS@SHARE; write it as in 256@50%,512@75%"),
        ({"grow": {"at": "a@50%"}}, "'a@50%' is not SUB_KEYS@SHARE"),
        ({"grow": {"at": "10@50%,12@40%"}}, "each growth must be larger and later than the one before"),
        ({"grow": {"at": "12@20%,10@40%"}}, "each growth must be larger and later than the one before"),
        ({"grow": {"at": "12@100%"}}, "shares of the budget lie between 0% and 100%"),
        ({"grow": {"at": "12@0"}}, "shares of the budget lie between 0% and 100%"),
        ({"grow": {"at": AT, "opening": 0.5}}, "what is added at 25% of the budget must be open by 60%; lower it"),
        ({"grow": {"at": AT, "opening": -1.0}}, "grow.opening = -1.0: must be 0 or more, below 1"),
        ({"grow": {"at": AT, "freeze": ["row"]}}, "grow.freeze has 'row': choose of rows, keys, query, rest"),
        ({"grow": {"at": "8@50%"}}, "8 sub-keys, 64 experts, but layer 'model.layers.1.ffw' begins with 64: give more"),
        (
            {"grow": {"at": AT}, "model": {"ffw_layers": "dense"}},
            "PeerForCausalLM has no PEER layer and no product-key",
        ),
        (
            {"grow": {"at": AT}, "model": {"peer": {"num_experts": 64, "pairing": "row-major"}}},
            "model.peer.pairing = 'row-major': layers that grow need 'shells'",
        ),
        (
            {"grow": {"at": AT, "freeze": ["rows"]}, "optim": {"tables": "fused"}},
            "optim.tables = 'fused' cannot be combined with grow.freeze",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        train(configure(**changes), progress=False)
