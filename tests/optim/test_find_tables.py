"""RowAdamW(model.parameters()) finds the tables of a model by itself, or says why it cannot train them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peerlm import PEER, ProductKeyMemory
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.catch_up import TOLERANCE
from peerlm.testing import relative_error

DIM = 8


def new_model(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = {"heads": 1, "key_dim": 4, "query_norm": "layer"}
    peer = PEER(DIM, num_experts=64, experts_per_head=3, **sizes, **settings)
    return nn.Sequential(nn.Linear(DIM, DIM), peer, ProductKeyMemory(DIM, num_values=64, values_per_head=3, **sizes))


def tables_of(model: nn.Sequential) -> list[nn.Parameter]:
    return [*model[1].experts.row_parameters(), *model[2].values.row_parameters()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> None:
    for seed in range(steps):
        x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed), dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def alike(found: list[nn.Parameter], expected: list[nn.Parameter]) -> bool:
    return list(map(id, found)) == list(map(id, expected))


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "named parameters": lambda model: model.named_parameters(),
    "a group": lambda model: [{"params": list(model.parameters()), "lr": 0.02}],
    "groups by name, as transformers makes them": lambda model: [
        {"params": [p for name, p in model.named_parameters() if "norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in model.named_parameters() if "norm" in name], "weight_decay": 0.0},
    ],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, nn.Module.double], ids=["new", "copy", "cast"])
def test_tables_get_a_group_as_parameter_groups_makes_it(change: Callable[[nn.Module], Any], way: str) -> None:
    model = change(new_model())
    optimizer = RowAdamW(WAYS[way](model), lr=0.01)
    (group,) = (group for group in optimizer.param_groups if group["rows"])
    (expected,) = (group for group in parameter_groups(model) if group["name"] == "table")
    assert group["name"] == "table"
    assert alike(group["params"], expected["params"])
    assert alike(group["params"], tables_of(model))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    train(model, optimizer, 1)
    assert all(parameter.grad.is_sparse for parameter in tables_of(model))
    if way == "named parameters":
        assert all(len(group["param_names"]) == len(group["params"]) for group in optimizer.param_groups)


def test_weights_are_those_of_adamw_by_the_same_call() -> None:
    models = [new_model(backend="reference").double() for _ in range(2)]
    optimizers = [
        kind(model.parameters(), lr=0.01, weight_decay=0.1) for kind, model in zip(KINDS, models, strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    optimizers[1].catch_up()
    for dense, rows in zip(*(model.parameters() for model in models), strict=True):
        assert relative_error(rows, dense) < TOLERANCE


KINDS: tuple[Any, Any] = (torch.optim.AdamW, RowAdamW)


def test_a_group_of_tables_alone_stays_one_group() -> None:
    model = new_model()
    optimizer = RowAdamW(tables_of(model))
    assert [(group["name"], group["rows"]) for group in optimizer.param_groups] == [("table", True)]


def test_who_asks_for_a_dense_table_gets_one() -> None:
    model = new_model()
    optimizer = RowAdamW([{"params": model.parameters(), "rows": False}])
    assert [group["rows"] for group in optimizer.param_groups] == [False]
    train(model, optimizer, 1)
    assert not any(parameter.grad.is_sparse for parameter in tables_of(model))


def test_frozen_tables_and_int8_rows_are_let_be() -> None:
    model = new_model(row_format="int8")
    model[2].values.requires_grad_(False)
    optimizer = RowAdamW(model.parameters())
    assert [group["rows"] for group in optimizer.param_groups] == [False]


def test_tables_that_exact_mode_cannot_train_are_refused_and_nothing_is_added() -> None:
    model = new_model(row_format="bfloat16")
    optimizer = RowAdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"bfloat16.*: pass lazy=True, or betas with beta1 = 0"):
        optimizer.add_param_group({"params": model.parameters()})
    assert len(optimizer.param_groups) == 1


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("groups", [parameter_groups, nn.Module.parameters])
def test_tables_that_fsdp_has_cut_are_refused(groups: Callable[[nn.Module], Any]) -> None:
    model = new_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"a table \(\d+, 2, 8\) is a DTensor, as FSDP2 makes them.*: take Distributed"
    ):
        RowAdamW(groups(model))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tables_beside_parameters_that_fsdp_has_cut_are_trained_on_one_rank() -> None:
    model, twin = new_model().double(), new_model().double()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=set(tables_of(model)))
    optimizers = [RowAdamW(each.parameters(), lr=0.01) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, 3)
        optimizer.catch_up()
    for found, expected in zip(tables_of(model), tables_of(twin), strict=True):
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tables_beside_parameters_that_fsdp_has_cut_over_ranks_are_refused() -> None:
    model = new_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(tables_of(model)))
    with pytest.raises(ValueError, match="FSDP2 does not exchange the gradients of tables that it ignores"):
        RowAdamW(model.parameters())


def test_a_tensor_of_another_kind_is_not_watched() -> None:
    class Odd(torch.Tensor):
        pass

    rows: Tensor = torch.ones(3, 2).as_subclass(Odd).requires_grad_()
    with pytest.raises(TypeError, match="rows are of class Odd; only plain parameters can be trained by rows"):
        RowAdamW([{"params": [rows], "rows": True}])
