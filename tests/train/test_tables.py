"""Tables updated by rows in a run: which optimizer a recipe gets, and runs that are stopped on the way."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from peerlm.convert.saved import load_saved
from peerlm.data import TokenShards
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.ops.row_updates import is_watched
from peerlm.optim import RowAdamW
from peerlm.optim.catch_up import TOLERANCE
from peerlm.ranks import Ranks
from peerlm.train import TrainConfig, TrainingStopped, loop, train
from peerlm.train.build import build_model, build_optimizer
from peerlm.train.checkpoint import list_checkpoints

Configure = Callable[..., TrainConfig]
UNCLIPPED = {"table_clip": float("inf")}
WHOLE_BATCHES = {"micro_batch_size": 4}
MANY = {"peer": {"num_experts": 1024, "heads": 2, "experts_per_head": 2, "key_dim": 8}}
EIGHT_BITS = {"peer": {**MANY["peer"], "row_format": "int8"}}


def optimizer_of(config: TrainConfig) -> torch.optim.Optimizer:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    model = build_model(config, TokenShards(config.data.folder, "train"), ranks.device)
    return build_optimizer(model, config, ranks)


def rows_of(run: str) -> torch.Tensor:
    weights = load_file(Path(run) / "model" / "model.safetensors")
    (rows,) = (value for name, value in weights.items() if name.endswith("experts.rows"))
    return rows


def test_large_tables_go_by_rows_and_small_ones_whole(configure: Configure) -> None:
    assert isinstance(optimizer_of(configure(model=MANY)), RowAdamW)
    tokens = configure().data.batch_size * configure().data.context
    for n in (math.isqrt(tokens), math.isqrt(tokens - 1)):  # 4 retrieved rows for each, and a few more
        model = {"peer": {"num_experts": n * n, "heads": 2, "experts_per_head": 2, "key_dim": 8}}
        kind = RowAdamW if n * n == tokens else torch.optim.AdamW
        assert isinstance(optimizer_of(configure(model=model)), kind)
    assert isinstance(optimizer_of(configure(model=MANY, compile=True)), torch.optim.AdamW)
    assert isinstance(optimizer_of(configure(model=MANY, optim={"tables": "dense"})), torch.optim.AdamW)


def test_betas_that_rows_cannot_catch_up_with_are_left_to_dense_updates(configure: Configure) -> None:
    betas = {"beta1": 0.95, "beta2": 0.95}
    assert isinstance(optimizer_of(configure(model=MANY, optim=betas)), torch.optim.AdamW)
    with pytest.raises(UserError, match=r"optim.tables = 'exact': betas = \(0.95, 0.95\)"):
        optimizer_of(configure(model=MANY, optim={**betas, "tables": "exact"}))


def test_moments_of_tables_are_those_of_the_recipe(configure: Configure) -> None:
    optimizer = optimizer_of(configure(optim={"table_beta1": 0.0, "table_row_wise": True}))
    (table,) = (group for group in optimizer.param_groups if group["name"] == "table")
    assert table["betas"] == (0.0, 0.98)
    assert table["row_wise"]
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups if group is not table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True, "optim": {"tables": "exact"}}, "cannot be combined with compile = true: set it to false"),
        ({"optim": {"tables": "fused"}}, "cannot be combined with optim.table_clip = 1.0: set it to inf"),
        (
            {"optim": {"tables": "fused", **UNCLIPPED}},
            "cannot be combined with data.micro_batch_size = 2: leave it out",
        ),
        (
            {"optim": {"tables": "dense", "table_row_wise": True}},
            "'dense' cannot be combined with optim.table_row_wise = true",
        ),
        ({"optim": {"tables": "dense", "table_beta1": 0.0}}, "'dense' cannot be combined with optim.table_beta1 = 0.0"),
        (
            {"optim": {"tables": "dense"}, "model": {"peer": {**MANY["peer"], "row_format": "bfloat16"}}},
            "'dense' cannot be combined with row_format = 'bfloat16'",
        ),
        (
            {"optim": {"tables": "exact"}, "model": {"peer": {**MANY["peer"], "row_format": "bfloat16"}}},
            "'bfloat16' cannot be combined with a first moment of tables, beta1 = 0.9: set optim.table_beta1 = 0.0, or",
        ),
        (
            {"optim": {"tables": "exact"}, "model": EIGHT_BITS},
            "'exact' cannot be combined with row_format = 'int8', whose rows have no gradient: set it to 'fused'",
        ),
        ({"model": EIGHT_BITS}, "optim.table_clip = 1.0: set it to inf"),
        (
            {"optim": UNCLIPPED, "model": EIGHT_BITS, "data": WHOLE_BATCHES},
            "'int8' cannot be combined with a first moment of tables, beta1 = 0.9: set optim.table_beta1 = 0.0$",
        ),
        (
            {
                "optim": {**UNCLIPPED, "table_beta1": 0.0},
                "model": EIGHT_BITS,
                "data": WHOLE_BATCHES,
                "grow": {"at": "33@50%", "freeze": ("rows",)},
            },
            "row_format = 'int8' cannot be combined with grow.freeze: the backward pass updates all rows",
        ),
        (
            {"model": {"hidden_size": 32, "peer": {**MANY["peer"], "row_format": "int4"}}},
            "row_format = 'int4' in .model.: rows in int4 are not trained: .*; train in float32, and convert the model",
        ),
    ],
)
def test_what_does_not_go_together(configure: Configure, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer_of(configure(**changes))


@pytest.mark.usefixtures("float64")
def test_exact_updates_end_where_dense_ones_do(configure: Configure, tmp_path: Path) -> None:
    outcomes = {}
    for tables in ("dense", "exact", "lazy"):
        config = configure(run=str(tmp_path / tables), optim={"tables": tables}, model=MANY, budget={"steps": 12})
        start = build_model(config, TokenShards(config.data.folder, "train"), torch.device("cpu"))
        (before,) = (value for name, value in start.state_dict().items() if name.endswith("experts.rows"))
        train(config, progress=False)
        outcomes[tables] = rows_of(config.run) - before
    moved = outcomes["dense"].norm()
    assert (outcomes["exact"] - outcomes["dense"]).norm() < TOLERANCE * moved
    assert (outcomes["lazy"] - outcomes["dense"]).norm() > 0.1 * moved


def stop_after_five_steps(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = loop.take_step

    def signalled(training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return take_step(training, state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", signalled)
        with pytest.raises(TrainingStopped):
            train(config, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": {"tables": "exact"}},
        {"optim": {"tables": "lazy"}},
        {"optim": {"tables": "fused", **UNCLIPPED}, "data": WHOLE_BATCHES},
        {
            "optim": {"tables": "fused", "table_beta1": 0.0, "table_row_wise": True, **UNCLIPPED},
            "data": WHOLE_BATCHES,
            "model": {"peer": {**MANY["peer"], "row_format": "bfloat16"}},
        },
        {
            "optim": {"table_beta1": 0.0, "table_row_wise": True, "table_lr_multiplier": 4.0, **UNCLIPPED},
            "data": WHOLE_BATCHES,
            "model": EIGHT_BITS,
        },
    ],
    ids=["exact", "lazy", "fused", "small state", "8 bits"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = {"model": MANY, "budget": {"steps": 11}, **settings}
    straight, stopped = (configure(run=str(tmp_path / name), **settings) for name in ("straight", "stopped"))
    train(straight, progress=False)
    stop_after_five_steps(stopped, monkeypatch)  # neither checkpoint nor evaluation is due then
    train(stopped, resume=True, progress=False)
    weights = [(Path(config.run) / "model" / "model.safetensors").read_bytes() for config in (straight, stopped)]
    assert weights[0] == weights[1]
    before = build_model(straight, TokenShards(straight.data.folder, "train"), torch.device("cpu"))
    assert not torch.equal(rows_of(straight.run), before.get_parameter("model.layers.1.ffw.experts.rows"))


@pytest.mark.parametrize("load", [lambda folder: load_model(folder)[0], load_saved], ids=["to evaluate", "to change"])
def test_a_checkpoint_between_two_steps_is_read_with_its_rows_up_to_date(
    load: Callable[[Path], PreTrainedModel], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for tables in ("dense", "exact"):
        run = tmp_path / tables
        settings = {"model": MANY, "budget": {"steps": 11}, "checkpoint": {"every": 0}, "eval": {"every": 0}}
        config = configure(run=str(run), optim={"tables": tables, "learning_rate": 1e-2}, **settings)
        stop_after_five_steps(config, monkeypatch)
        (checkpoint,) = list_checkpoints(run)
        model = load(checkpoint)
        assert not any(is_watched(parameter) for parameter in model.parameters())
        found[tables] = model.get_parameter("model.layers.1.ffw.experts.rows")
        if tables == "exact":
            as_written = load_file(checkpoint / "model.safetensors")["model.layers.1.ffw.experts.rows"]
    stale = (as_written - found["exact"]).abs().max()
    assert stale > 1e-4
    assert (found["exact"] - found["dense"]).abs().max() < 1e-2 * stale


@pytest.mark.parametrize("tables", ["dense", "exact"])
def test_muon_trains_matrices_whatever_trains_tables(
    configure: Configure, tables: str, caplog: pytest.LogCaptureFixture
) -> None:
    optim = {"matrices": "muon", "momentum": 0.9, "tables": tables}
    optimizer = optimizer_of(configure(model={**MANY, "tie_word_embeddings": False}, optim=optim))
    assert isinstance(optimizer, RowAdamW)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["muon"]["momentum"] == 0.9
    assert groups["table"]["rows"] == (tables == "exact")
    assert "AdamW trains the output head and matrices of one row: 299x16" in caplog.text


def test_small_steps_of_other_tables_in_bfloat16_are_not_lost(configure: Configure) -> None:
    ngrams = {"num_rows": 8, "orders": [2], "hashes": 1}
    model = {"ffw_layers": "hashed_ngrams+dense", "hashed_ngrams": ngrams}
    assert isinstance(optimizer_of(configure(model=model)), torch.optim.AdamW)
    ngrams["row_format"] = "bfloat16"
    with pytest.raises(UserError, match="row_format = 'bfloat16' cannot be combined with a first moment of tables"):
        optimizer_of(configure(model=model))
    assert isinstance(optimizer_of(configure(model=model, optim={"tables": "lazy"})), RowAdamW)
