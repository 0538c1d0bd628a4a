"""What a plan for a mesh says is what ranks count; and it says what fits, and what would."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from peerlm.cli import main
from peerlm.errors import UserError
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.parallel import mesh, parallelize, sharded_tables
from peerlm.parallel.cost import GPUS, Shape, Tables, memory, received_per_token, seconds, step_bytes
from peerlm.parallel.plans import plan_meshes, tables_of, what_would_fit

from .test_exchange import LAYERS, TOKENS, peer
from .test_exchange import memory as value_memory
from .together import together

SMALL = Tables(num_rows=49, dim=8, heads=2, per_head=3, key_dim=8, activation_bytes=4)
MANY = 300
"""Tokens that together look up each of four rows."""
GROUPS = {"experts": 2, "gated experts": 3, "values": 1}


def counted(rank: int, world: int, rows: int, cols: int) -> dict[str, float]:
    """Bytes received per token of each kind of layer, and of one in bfloat16."""
    made = {kind: (LAYERS[kind](), torch.float32) for kind in GROUPS}
    made["half"] = (peer().to(torch.bfloat16), torch.bfloat16)
    found = {}
    ranks = mesh(rows=rows, cols=cols)
    for kind, (layer, dtype) in made.items():
        found[kind] = received(layer, ranks, dtype)
    return found


def received(layer: nn.Module, ranks: DeviceMesh, dtype: torch.dtype, tokens: int = TOKENS) -> float:
    """Bytes received per token of a layer's passes, over a mesh."""
    for name, parameter in layer.named_parameters():
        if "keys" in name:
            parameter.requires_grad_(False)  # so that none is averaged
    parallelize(layer, ranks, dense="replicate")
    (table,) = sharded_tables(layer).values()
    optimizer = RowAdamW(parameter_groups(layer), lr=0.0, lazy=True)  # gradients are of the rows that are looked up
    before = table.place.traffic.received
    layer(torch.randn(tokens, 8, dtype=dtype).requires_grad_()).sum().backward()
    assert optimizer.param_groups
    return (table.place.traffic.received - before) / tokens


@pytest.mark.parametrize(("rows", "cols"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_receive_what_is_planned(rows: int, cols: int) -> None:
    shape = Shape(cols=cols, rows=rows)
    planned = {kind: Tables(**{**vars(SMALL), "vectors": vectors}) for kind, vectors in GROUPS.items()}
    planned["half"] = Tables(**{**vars(SMALL), "activation_bytes": 2})
    expected = {kind: sum(received_per_token(tables, shape).values()) for kind, tables in planned.items()}
    assert len(set(expected.values())) >= 2
    assert together(counted, rows * cols, rows, cols) == [expected] * (rows * cols)


@pytest.mark.parametrize(("rows", "cols"), [(2, 1), (1, 2)])
def test_copies_receive_the_gradients_of_rows_that_are_planned(rows: int, cols: int) -> None:
    for found in together(counted_of_copies, 4, rows, cols):
        for (kind, num_rows), bytes_ in found.items():
            tables = Tables(
                **{**vars(SMALL), "num_rows": num_rows, "vectors": GROUPS[kind], "per_head": 2, "tokens": MANY}
            )
            planned = received_per_token(tables, Shape(replica=2, cols=cols, rows=rows))
            assert planned["replica"] > 0
            if num_rows == 4:  # so many tokens look all of them up
                assert bytes_ == pytest.approx(sum(planned.values()), rel=1e-12)
            else:
                assert planned["cols"] + planned["rows"] < bytes_ <= sum(planned.values())


def counted_of_copies(rank: int, world: int, rows: int, cols: int) -> dict[tuple[str, int], float]:
    """Bytes received per token of layers with four rows and with more, where there are two copies."""
    found = {}
    ranks = mesh(rows=rows, cols=cols, replica=2)
    torch.manual_seed(rank)
    for num_rows in (4, 10_000):
        made = {
            "experts": peer(num_experts=num_rows, experts_per_head=2),
            "gated experts": peer(num_experts=num_rows, experts_per_head=2, gated=True),
            "values": value_memory(num_values=num_rows, values_per_head=2),
        }
        for kind, layer in made.items():
            found[kind, num_rows] = received(layer, ranks, torch.float32, MANY)
    return found


def test_bytes_of_the_grid_of_256_are_those_of_the_design() -> None:
    found = received_per_token(Tables(num_rows=31623**2, dim=4096, activation_bytes=2), Shape(cols=32, rows=8))
    assert found == {
        "replica": 0,
        "cols": 4 * 4096 * 4 * 31 / 32 + 20 * 128 * 31,
        "rows": 7 * (4 * 4096 * 4 + 20 * 128 * 32),
    }


def test_what_a_node_has_comes_by_nvlink() -> None:
    tables = Tables(num_rows=4, dim=512, per_head=1, heads=1, key_dim=2)
    of_token = received_per_token(tables, Shape(cols=4, rows=8))
    dense = 31 / 32 * (12 * tables.cut_parameters + 8 * tables.key_parameters)
    found = step_bytes(tables, Shape(cols=4, rows=8))
    assert found["nvlink"] == pytest.approx(4096 * of_token["rows"] + dense * 7 / 31)
    assert found["network"] == pytest.approx(4096 * of_token["cols"] + dense * 24 / 31)
    assert step_bytes(tables, Shape(cols=4, rows=8, per_node=32))["network"] == 0
    assert step_bytes(tables, Shape(cols=1, rows=1)) == {"network": 0, "nvlink": 0}
    assert Shape(cols=1, rows=12).neighbours(12, 1) == 3  # the second node has four of the twelve
    assert Shape(cols=4, rows=2).neighbours(4, 2) == 3
    assert Shape(cols=4, rows=4).neighbours(4, 4) == 1


def test_memory_is_that_of_parts() -> None:
    tables = Tables(num_rows=10**4, dim=256, tokens=2, key_dim=16, layers=3)
    found = memory(tables, Shape(cols=2, rows=8))
    assert found["rows"] == 3 * 1250 * 2 * 128 * 4
    assert found["moments"] == 2 * found["rows"]
    assert found["counters"] == 3 * 1250 * 8
    one = 2 * 2 * 128 * (2 * 128 * 4 + 8)  # 16 ranks look up 4,096 entries, in the rows of each rank 512 of them
    keys = 4 * 100 * 16
    assert found["gradients"] == 3 * (one + keys) + 4 * tables.cut_parameters / 16
    own_keys = memory(Tables(**{**vars(tables), "shared_keys": False}), Shape(cols=2, rows=8))
    assert own_keys["sub-keys"] == 8 * found["sub-keys"] == 3 * 8 * 3 * keys
    fused = memory(Tables(**{**vars(tables), "fused": True}), Shape(cols=2, rows=8))
    assert found["gradients"] - fused["gradients"] == 3 * one
    every = memory(Tables(**{**vars(tables), "tokens": 2000, "fused": False}), Shape(cols=2, rows=8))
    assert every["gradients"] - fused["gradients"] == 3 * 1250 * (2 * 128 * 4 + 8)  # no more than a rank has


def test_an_update_moves_all_that_a_row_has() -> None:
    tables = Tables(num_rows=10**8, dim=256, tokens=2)
    looked_up, of_row = 2 * 2 * 128, 2 * 128 * 4
    found = seconds(tables, Shape(cols=2, rows=8), GPUS["h100"])["memory"]
    assert found == pytest.approx((2 * looked_up * of_row + 2 * looked_up * (3 * of_row + 8)) / 3.35e12)


def test_plans_are_in_order_and_what_would_fit_fits() -> None:
    tables = tables_of(1e9, dim=4096)
    plans = plan_meshes(tables, 64, GPUS["h200"])
    assert not any(plan.fits for plan in plans)
    assert {plan.shape.gpus for plan in plans} == {64}
    found = dict(what_would_fit(tables, 64, GPUS["h200"]))
    assert all(plan.fits and not plan.obstacle for plan in found.values())
    assert "--row-format bfloat16 --fused" not in found  # 16.4 TB are 256 GB for each
    assert found["--gpus 256 --row-format bfloat16 --fused"].shape.gpus == 256
    (fewer,) = (words for words in found if words.startswith("--num-experts"))
    side = round(int(fewer.split()[1]) ** 0.5)
    assert plan_meshes(Tables(num_rows=side**2, dim=4096), 64, GPUS["h200"])[0].fits
    assert not plan_meshes(Tables(num_rows=(side + 1) ** 2, dim=4096), 64, GPUS["h200"])[0].fits
    fitting = plan_meshes(tables_of(1e6, dim=256), 16, GPUS["h100"])
    assert len(fitting) == 15
    assert {plan.shape.replica for plan in fitting} == {1, 2, 4, 8, 16}
    assert all(sum(a.seconds.values()) <= sum(b.seconds.values()) for a, b in pairwise(fitting))


def test_numbers_of_rows_are_a_limit_of_their_own() -> None:
    tables = tables_of(3e9, dim=128, heads=1, per_head=1, tokens=1, row_format="bfloat16", fused=True)
    (plan,) = plan_meshes(tables, 1, GPUS["b200"])
    assert plan.obstacle == "memory"
    tables = tables_of(3e9, dim=1, heads=1, per_head=1, key_dim=2, tokens=1)
    assert plan_meshes(tables, 1, GPUS["b200"])[0].obstacle == "2^31 rows or more on a GPU"
    assert plan_meshes(tables, 2, GPUS["b200"])[0].fits


def test_copies_pay_where_a_table_is_small_and_are_not_planned_for_fused_ones() -> None:
    few, many = tables_of(1e4, dim=256), tables_of(1e8, dim=256)
    assert plan_meshes(few, 16, GPUS["h100"])[0].shape.replica > 1
    assert plan_meshes(many, 16, GPUS["h100"])[0].shape.replica == 1
    assert {plan.shape.replica for plan in plan_meshes(tables_of(1e4, dim=256, fused=True), 16, GPUS["h100"])} == {1}
    whole = memory(few, Shape(replica=4, cols=1, rows=1))
    assert whole["rows"] == memory(few, Shape(cols=1, rows=1))["rows"]
    assert whole["gradients"] > memory(few, Shape(cols=1, rows=4))["gradients"]
    network = [step_bytes(few, Shape(replica=2, cols=1, rows=8, per_node=each))["network"] for each in (8, 16)]
    assert network[0] > network[1] == 0


def test_bfloat16_columns_keep_whole_blocks_of_moments() -> None:
    tables = tables_of(1e4, dim=256, row_format="bfloat16")
    assert {plan.shape.cols for plan in plan_meshes(tables, 8, GPUS["h100"])} == {1, 2}


def run_plan(*options: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *options])
    return end.value.code


def test_the_command_prints_meshes_parts_and_assumptions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["--gpus", "64", "--gpu", "h200", "--num-experts", "1e9", "--dim", "4096"]
    assert run_plan(*asked) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "No mesh of 64 GPUs fits: memory." in shown
    words = " ".join(shown.split())
    for part in ("moments, GB", "counters, GB", "sub-keys, GB", "NVLink, ms per step", "No time was measured"):
        assert part in words
    assert "1,000,014,129 rows of 2 x 4096 float32" in words
    assert run_plan(*asked, "--json", "-") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_experts"] == 31623**2
    assert figures["would_fit"]
    assert {mesh["replica"] * mesh["cols"] * mesh["rows"] for mesh in figures["meshes"]} == {64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to plan for: give --flops, or --gpus with --num-experts and --dim"),
        (["--gpus", "8"], "--gpus needs --num-experts and --dim too"),
        (["--gpus", "8", "--flops", "1e12"], "--flops cannot be combined with --gpus"),
        (["--flops", "1e12", "--dim", "8"], "--dim cannot be combined with --flops"),
        (["--gpus", "0", "--num-experts", "9", "--dim", "8", "--experts-per-head", "2"], "--gpus 0: must be 1 to"),
        (["--gpus", "8", "--gpu", "abacus", "--num-experts", "900", "--dim", "8"], "--gpu 'abacus': choose from"),
        (["--gpus", "8", "--num-experts", "nan", "--dim", "8"], "--num-experts nan: must be 1 to 1e15"),
        (["--gpus", "8", "--num-experts", "900", "--dim", "0"], "--dim 0: must be at least 1"),
        (["--gpus", "8", "--num-experts", "900", "--dim", "8", "--row-format", "int4"], "--row-format 'int4': choose"),
        (["--gpus", "8", "--num-experts", "900", "--dim", "8", "--row-format", "bfloat16"], "a multiple of 128"),
        (["--gpus", "8", "--num-experts", "9", "--dim", "8"], "--experts-per-head 16: there are only 9 experts"),
        (["--gpus", "8", "--num-experts", "900", "--dim", "8", "--dense-parameters", "-1"], "--dense-parameters -1"),
        (["--gpus", "8", "--num-experts", "900", "--dim", "8", "--gpus-per-node", "0"], "--gpus-per-node 0: must"),
    ],
)
def test_wrong_options_are_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(*options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_settings_of_tables_are_checked() -> None:
    with pytest.raises(UserError, match="--tokens 0: must be at least 1"):
        tables_of(100, dim=8, tokens=0)
