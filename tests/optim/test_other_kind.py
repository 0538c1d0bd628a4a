"""A run that goes on with another kind of optimizer goes on as if it had always had that one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from peerlm.layers.expert_table import ExpertTable
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.saved import load_state, save_state

STEPS = 14
EXPERTS = 64
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def table_of() -> ExpertTable:
    torch.manual_seed(0)
    return ExpertTable(EXPERTS, 8)


def by_rows(table: ExpertTable) -> Optimizer:
    return RowAdamW(parameter_groups(table, weight_decay=0.1), **OPTIONS)


def at_once(table: ExpertTable) -> Optimizer:
    return torch.optim.AdamW(parameter_groups(table, weight_decay=0.1), **OPTIONS)


def at_once_of_ours(table: ExpertTable) -> Optimizer:
    groups = parameter_groups(table, weight_decay=0.1)
    return RowAdamW([{"rows": False, **group} for group in groups], **OPTIONS)


def train(table: ExpertTable, optimizer: Optimizer, first: int, last: int) -> None:
    """Steps of few experts each, so that most rows have none."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, weights = torch.randn(3, 8, generator=generator), torch.rand(3, 2, generator=generator)
        ids = torch.randint(EXPERTS, (3, 2), generator=generator)
        table(x, weights, ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def straight() -> tuple[ExpertTable, Optimizer]:
    table = table_of()
    optimizer = at_once(table)
    train(table, optimizer, 0, STEPS)
    return table, optimizer


@pytest.mark.parametrize("stale", [True, False], ids=["rows as they are", "rows up to date"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(by_rows, at_once), (by_rows, at_once_of_ours), (at_once, by_rows), (at_once_of_ours, by_rows)],
)
def test_another_kind_goes_on(
    before: Callable[[ExpertTable], Optimizer],
    after: Callable[[ExpertTable], Optimizer],
    stale: bool,
    tmp_path: Path,
) -> None:
    table = table_of()
    optimizer = before(table)
    train(table, optimizer, 0, 9)
    if stale:
        with rows_as_they_are():
            assert save_state(optimizer, tmp_path, table) == (before is by_rows)
            rows = table.rows.detach().clone()
    else:
        save_state(optimizer, tmp_path, table)
        rows = table.rows.detach().clone()

    resumed = table_of()
    with torch.no_grad():
        resumed.rows.copy_(rows)
    other = after(resumed)
    load_state(other, tmp_path)
    train(resumed, other, 9, STEPS)
    expected, its_optimizer = straight()
    torch.testing.assert_close(resumed.read(), expected.read(), rtol=1e-5, atol=1e-6)
    save_state(other, tmp_path, resumed)
    load_state(whole := at_once(resumed), tmp_path)
    [found], [state] = whole.state.values(), its_optimizer.state.values()
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(found[name], state[name], rtol=1e-4, atol=1e-7)
