"""Parameter groups and clipping against values worked out by hand."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from peerlm.optim import clip_gradients, parameter_groups


class Memory(nn.Module):
    parameter_roles: ClassVar = {"values": "table", "sub_keys": "keys", "gate": "table"}

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(9, 4))
        self.sub_keys = nn.Parameter(torch.ones(2, 3, 4))
        self.gate = None
        self.query = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # The head comes before the embedding it shares its weight with.
        self.head = nn.Linear(4, 5, bias=False)
        self.embedding = nn.Embedding(5, 4)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(4)
        self.memory = Memory()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.experts = nn.Parameter(torch.ones(2, 4, 4))


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = Model()
    groups = {group["name"]: group for group in parameter_groups(model)}

    def names(group: str) -> set[str]:
        ids = {id(parameter) for parameter in groups[group]["params"]}
        return {name for name, parameter in model.named_parameters() if id(parameter) in ids}

    assert names("matrix") == {"memory.query.weight", "experts"}
    assert names("vector") == {"head.weight", "norm.weight", "norm.bias", "memory.query.bias"}
    assert names("table") == {"memory.values"}
    assert names("keys") == {"memory.sub_keys"}
    assert sum(len(group["params"]) for group in groups.values()) == 8


def test_only_matrices_decay_and_multipliers_go_to_their_groups() -> None:
    groups = parameter_groups(Model(), weight_decay=0.1, table_lr_multiplier=4.0, keys_lr_multiplier=2.0)
    settings = {group["name"]: (group["weight_decay"], group["lr_multiplier"]) for group in groups}
    assert settings == {"matrix": (0.1, 1.0), "vector": (0.0, 1.0), "table": (0.0, 4.0), "keys": (0.0, 2.0)}


def test_groups_without_members_are_left_out() -> None:
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2))] == ["matrix", "vector"]


def test_adamw_accepts_the_groups_and_decays_only_matrices() -> None:
    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"memory.query.weight", "experts"}


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"values": "tabel"},
            r"memory\.parameter_roles gives 'values' the role 'tabel'; use 'table' or 'keys'",
        ),
        ({"valeus": "table"}, r"memory\.parameter_roles names 'valeus', which it does not have"),
    ],
)
def test_a_wrong_declaration_is_named(roles: dict[str, str], message: str) -> None:
    model = Model()
    model.memory.parameter_roles = roles
    with pytest.raises(ValueError, match=message):
        parameter_groups(model)


def groups_with_gradients(rest: float, table: float) -> list[dict]:
    model = Model()
    groups = parameter_groups(model)
    for group in groups:
        value = table if group["name"] == "table" else rest
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, value)
    return groups


def gradients(groups: list[dict], *, table: bool) -> torch.Tensor:
    chosen = [p.grad.flatten() for g in groups if (g["name"] == "table") == table for p in g["params"]]
    return torch.cat(chosen)


@pytest.mark.usefixtures("float64")
def test_tables_and_the_rest_are_clipped_apart() -> None:
    groups = groups_with_gradients(rest=0.001, table=100.0)
    norms = clip_gradients(groups, max_norm=1.0, table_max_norm=3.0)
    assert norms.table == pytest.approx(100.0 * 36**0.5)
    assert norms.rest == pytest.approx(0.001 * gradients(groups, table=False).numel() ** 0.5)
    assert gradients(groups, table=True).norm().item() == pytest.approx(3.0)
    assert torch.equal(gradients(groups, table=False).unique(), torch.tensor([0.001]))


@pytest.mark.usefixtures("float64")
def test_large_gradients_outside_tables_are_clipped_together() -> None:
    groups = groups_with_gradients(rest=5.0, table=0.01)
    clip_gradients(groups, max_norm=1.0, table_max_norm=1.0)
    rest = gradients(groups, table=False)
    assert rest.norm().item() == pytest.approx(1.0)
    assert rest.unique().numel() == 1
    assert torch.equal(gradients(groups, table=True).unique(), torch.tensor([0.01]))


def test_an_infinite_limit_never_clips() -> None:
    groups = groups_with_gradients(rest=5.0, table=5.0)
    clip_gradients(groups, max_norm=math.inf, table_max_norm=math.inf)
    assert gradients(groups, table=False).unique().tolist() == [5.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("table", [False, True])
def test_a_norm_that_is_not_finite_is_reported_and_scales_nothing(value: float, table: bool) -> None:
    groups = groups_with_gradients(rest=2.0 if table else value, table=value if table else 2.0)
    norms = clip_gradients(groups, max_norm=1.0, table_max_norm=1.0)
    assert not norms.finite
    assert gradients(groups, table=not table).unique().tolist() == [2.0]
