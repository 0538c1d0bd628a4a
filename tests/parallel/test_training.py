"""Sharded runs take the steps of one process: losses, norms and ids are the same, whatever the mesh."""

import lzma
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peerlm
from peerlm.data import batches
from peerlm.errors import UserError
from peerlm.parallel import sharded_tables, since_last
from peerlm.ranks import Ranks
from peerlm.train import TrainConfig
from peerlm.train.build import _spread as spread
from peerlm.train.build import build_training, open_data
from peerlm.train.checkpoint import TrainState
from peerlm.train.config import ParallelConfig
from peerlm.train.feed import Feed
from peerlm.train.loop import take_step
from peerlm.train.recipe import from_dict

from .together import together

STEPS = int(os.environ.get("PEERLM_STEPS", "4"))
"""50 and more show more than the suite has time for."""
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "ffw_layers": ["dense", "peer", "pkm"],
    "peer": {"num_experts": 256, "heads": 2, "experts_per_head": 4, "key_dim": 16},
    "pkm": {"num_values": 121, "heads": 1, "values_per_head": 4, "key_dim": 16},
}


def without_batch_norm() -> dict[str, Any]:
    """A model whose output for a window does not depend on which others are read with it."""
    layers: Any = {kind: MODEL[kind] for kind in ("peer", "pkm")}
    return {**MODEL, **{kind: {**settings, "query_norm": "layer"} for kind, settings in layers.items()}}


def curve(rank: int, world: int, values: dict[str, Any], steps: int) -> dict[str, Any]:
    """Losses, norms of gradients, what is retrieved in the end, and the table's first rows."""
    config = from_dict(TrainConfig, values)
    ranks = Ranks(rank=rank, world_size=world, device=torch.device("cpu"))
    windows, _ = open_data(config.data, ranks, progress=False)
    training = build_training(config, ranks, windows)
    stream = batches(
        windows,
        batch_size=config.data.batch_size // world,
        seed=config.seed,
        position=0,
        rank=rank,
        world_size=world,
    )
    feed = Feed.to(ranks.device, stream)
    state, losses, norms = TrainState(), [], []
    for _ in range(steps):
        for hook in training.hooks:
            state = hook.before_step(training, state, training.budget.next_progress(state.step, state.seconds))
        state, _ = take_step(training, state, feed, training.budget.next_progress(state.step, state.seconds))
        newest = training.measures.newest
        losses.append(newest["loss"])
        norms.append((newest["gradient norm"], newest["table gradient norm"]))
    measured = since_last(training.model, steps * config.data.batch_size * config.data.context / world)
    training.model.eval()
    ids: list[Tensor] = []
    index: Any = training.model.get_submodule("model.layers.1.ffw.product_keys")
    handle = index.register_forward_hook(lambda module, given, output: ids.append(output[1]))
    with torch.no_grad():
        training.model(input_ids=torch.arange(24).view(2, 12))
    handle.remove()
    with torch.no_grad():
        rows = [table.read().clone() for table in sharded_tables(training.model).values()]
    training.unwrap()
    return {"losses": losses, "norms": norms, "ids": ids[0], "rows": rows, **measured}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("sharded")
    text = root / "text.txt"
    with lzma.open(Path(peerlm.__file__).parent / "corpus/demo_corpus.txt.xz", "rt", encoding="utf-8") as corpus:
        text.write_text(corpus.read(60_000), encoding="utf-8")
    return {
        "run": str(root / "run"),
        "data": {
            "folder": str(root / "data"),
            "sources": [str(text)],
            "vocab_size": 300,
            "context": 16,
            "batch_size": 8,
            "micro_batch_size": None,
        },
        "budget": {"steps": STEPS},
        "model": MODEL,
        "optim": {"learning_rate": 1e-2, "clip": 0.5, "table_clip": 0.05},
        "log": {"every": 1000},
        "parallel": {"rows": 1, "cols": 1},
    }


@pytest.fixture(scope="module")
def one(recipe: dict[str, Any]) -> dict[str, Any]:
    (found,) = together(curve, 1, recipe, STEPS)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        ({"rows": 2}, {}),
        ({"rows": 4, "dense": "replicate"}, {}),
        ({"rows": 2, "cols": 2}, {}),
        ({"cols": 2}, {"gradient_checkpointing": True}),
        ({"rows": 2, "replica": 2}, {}),
    ],
    ids=["rows", "four rows, replicated", "grid", "columns, attention computed again", "two copies of rows"],
)
def test_losses_norms_and_ids_are_those_of_one_process(
    recipe: dict[str, Any], one: dict[str, Any], parallel: dict[str, Any], changes: dict[str, Any]
) -> None:
    world = math.prod(size for size in parallel.values() if isinstance(size, int))
    of_ranks = together(curve, world, {**recipe, **changes, "parallel": parallel}, STEPS)
    for found in of_ranks:
        assert all(map(torch.equal, found["rows"], of_ranks[0]["rows"]))  # copies of rows have the same bits
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["norms"], one["norms"], rtol=1e-4, atol=1e-5)
        assert torch.equal(found["ids"], one["ids"])
        torch.testing.assert_close(found["rows"], one["rows"], rtol=1e-3, atol=2e-4)
        assert found["received_bytes_per_token"] > 0
        assert set(found["load"]) == {"model.layers.1.ffw.experts", "model.layers.2.ffw.values"}
        assert all(1 <= uneven < 2 for uneven in found["load"].values())


@pytest.mark.parametrize(
    ("changes", "parallel"),
    [
        ({"grow": {"at": "20@50%", "opening": 0.2, "keys": "crowded"}}, {"rows": 2}),
        ({"optim": {"tables": "fused", "table_clip": "inf", "weight_decay": 0.1}}, {"rows": 2, "cols": 2}),
        ({"optim": {"tables": "lazy", "table_beta1": 0.0, "table_moment_columns": 8}}, {"rows": 1, "cols": 2}),
        (
            {
                "data": {"micro_batch_size": 4},
                "model": without_batch_norm(),
            },
            {"rows": 2},
        ),
        (
            {
                "data": {"micro_batch_size": 4},
                "model": without_batch_norm(),
                "grow": {"at": "20@50%", "opening": 0.2, "keys": "crowded"},
                "optim": {"tables": "lazy"},
            },
            {"cols": 2, "rows": 1, "replica": 2},
        ),
    ],
    ids=["growth", "fused", "lazy, no first moment, one second for 8 columns", "accumulation", "copies of columns"],
)
def test_each_way_to_train_is_that_of_one_process(
    recipe: dict[str, Any], changes: dict[str, Any], parallel: dict[str, Any]
) -> None:
    world = math.prod(parallel.values())
    values = {**recipe, **{key: {**recipe.get(key, {}), **change} for key, change in changes.items()}}
    values["optim"] = {key: math.inf if value == "inf" else value for key, value in values["optim"].items()}
    (alone,) = together(curve, 1, values, STEPS)
    if micro := values["data"]["micro_batch_size"]:
        values = {**values, "data": {**values["data"], "micro_batch_size": micro // world}}
    for found in together(curve, world, {**values, "parallel": parallel}, STEPS):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["ids"], alone["ids"])
        torch.testing.assert_close(found["rows"], alone["rows"], rtol=1e-3, atol=2e-4)


def test_copies_of_tables_that_are_not_cut_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.replica = 2 is of tables that are cut: set parallel.rows"):
        ParallelConfig(replica=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"peer": {"row_format": "int8"}}, "parallel": {"cols": 2}}, r"row_format = 'int8' .* cols = 2"),
        ({"model": {"peer": {"row_format": "int8"}}, "parallel": {"rows": 2, "replica": 2}}, r"'int8', .*replica = 2"),
        ({"optim": {"tables": "fused"}, "parallel": {"rows": 2, "replica": 2}}, r"'fused' .* parallel\.replica = 2"),
        ({"optim": {"table_row_wise": True}, "parallel": {"cols": 2}}, r"table_moment_columns = 128 in its place"),
        ({"optim": {"tables": "dense"}, "parallel": {"rows": 2}}, r"leave it out, or set it to 'exact'"),
        ({"optim": {"matrices": "muon"}, "parallel": {"rows": 2}}, r"set parallel\.dense = 'replicate'"),
    ],
)
def test_what_a_cut_table_cannot_be_trained_by_is_refused_with_the_recipe(
    recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, {**recipe, **changes})


def cut_of_what_is_left(rank: int, world: int, values: dict[str, Any]) -> str:
    config = from_dict(TrainConfig, values)
    try:
        spread(partial(pytest.fail, "a model was made"), config)
    except UserError as error:
        return str(error)
    return ""


def test_columns_that_rows_leave_are_refused_before_a_model_is_made(recipe: dict[str, Any]) -> None:
    values = {**recipe, "model": {"peer": {"row_format": "float8_e4m3fn"}}, "parallel": {"rows": 1}}
    for said in together(cut_of_what_is_left, 2, values):
        assert "row_format = 'float8_e4m3fn' has scales of whole vectors, which cols = 2 would cut" in said


@pytest.mark.parametrize("row_format", ["int8", "float8_e4m3fn"])
def test_rows_of_8_bits_are_trained_on_shards(recipe: dict[str, Any], row_format: str) -> None:
    """Sums over tokens are rounded otherwise on two ranks, which now and then turns a number to the next code."""
    peer: Any = MODEL["peer"]
    optim = {"tables": "fused", "table_beta1": 0.0, "table_clip": math.inf, "table_moment_columns": 8, "clip": 0.5}
    values = {
        **recipe,
        "model": {
            **MODEL,
            "ffw_layers": ["dense", "peer"],
            "num_hidden_layers": 2,
            "peer": {**peer, "row_format": row_format},
        },
        "optim": {"learning_rate": 1e-2, **optim},
    }
    (alone,) = together(curve, 1, values, STEPS)
    (start,) = together(curve, 1, values, 1)
    for found in together(curve, 2, {**values, "parallel": {"rows": 2}}, STEPS):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
        (one,), (two,), (before,) = alone["rows"], found["rows"], start["rows"]
        assert (one != before).float().mean() > 0.05
        assert torch.isclose(one, two, rtol=1e-5, atol=0).float().mean() > 0.99
        torch.testing.assert_close(two, one, rtol=0.15, atol=2 * one.abs().max().item() / 127)
