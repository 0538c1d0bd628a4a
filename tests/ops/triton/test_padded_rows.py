"""Gradients of rows whose number the host does not learn: clipped, accumulated, restricted, and stepped by."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from peerlm.layers import ExpertTable
from peerlm.ops.padded_rows import padded_ids
from peerlm.ops.triton import row_steps
from peerlm.optim import RowAdamW, clip_gradients
from peerlm.optim.restrict import restrict_gradient
from peerlm.optim.sparse_gradients import shorten
from peerlm.testing import assert_within_budget

from ...host_reads import NoHostReads


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreted kernels take steps of tables, and the host asks no device."""
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: row_steps)
    monkeypatch.setattr("peerlm.ops.triton.kernels.automatic", True)
    monkeypatch.setattr("peerlm.optim.groups.read_at_once", lambda device: device.type not in ("cpu", "cuda"))


def table_of(device: torch.device, dtype: torch.dtype = torch.float32, *, by_kernels: bool = True) -> ExpertTable:
    table = ExpertTable(24, 6, backend="triton" if by_kernels else "auto").to(device, dtype)
    table.write(torch.randn(24, 2, 6, generator=torch.Generator().manual_seed(0)))
    return table


def inputs_of(step: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, weights = (torch.randn(2, size, generator=generator).to(device, dtype) for size in (6, 3))
    return weights, torch.randint(0, 12, (2, 3), generator=generator).to(device), x


def trained(
    device: torch.device, *, by_kernels: bool, dtype: torch.dtype = torch.float32, lazy: bool, micro_batches: int
) -> dict[str, Tensor]:
    """Rows and norms after some steps with clipping; by kernels, the steps after the first two ask for nothing."""
    table = table_of(device, dtype, by_kernels=by_kernels)
    optimizer = RowAdamW(table.parameters(), lr=1e-2, weight_decay=0.1, lazy=lazy)
    norms = []
    for step in range(4):
        with NoHostReads() if by_kernels and step > 1 else nullcontext():
            for part in range(micro_batches):
                table.mix(*inputs_of(micro_batches * step + part, device, dtype)).square().sum().backward()
            limit = 0.5 if step % 2 else 1e6
            norms.append(clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=limit).of_tables)
            assert (padded_ids(table.rows) is not None) == by_kernels
            optimizer.step()
            optimizer.zero_grad()
    return {"rows": table.read().detach().cpu(), "norms": torch.stack(norms).cpu()}


@pytest.mark.parametrize(("lazy", "micro_batches"), [(True, 1), (False, 2)])
def test_a_training_is_that_of_the_definition(
    lazy: bool,
    micro_batches: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    cpu = torch.device("cpu")
    plain = trained(cpu, by_kernels=False, lazy=lazy, micro_batches=micro_batches)
    exact = trained(cpu, by_kernels=False, lazy=lazy, micro_batches=micro_batches, dtype=torch.float64)
    request.getfixturevalue("as_on_a_gpu")
    found = trained(device, by_kernels=True, lazy=lazy, micro_batches=micro_batches)
    assert_within_budget(found, plain, exact)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("entries", "left"), [(24, 24), (30, 24)])
def test_a_gradient_of_many_micro_batches_is_no_longer_than_the_table(
    entries: int, left: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerlm.optim.sparse_gradients.read_at_once", lambda device: False)
    table = torch.nn.Parameter(torch.zeros(24, 3, device=device))
    ids, values = torch.randint(12, (1, entries), device=device), torch.randn(entries, 3, device=device)
    table.grad = torch.sparse_coo_tensor(ids, values, table.shape, check_invariants=False)
    expected = table.grad.to_dense()
    with NoHostReads():
        shorten(table)
    assert table.grad._nnz() == left
    assert (padded_ids(table) is not None) == (entries > left)
    torch.testing.assert_close(table.grad.to_dense(), expected)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_rows_of_no_entry_are_not_visited(device: torch.device) -> None:
    table = table_of(device)
    optimizer = RowAdamW(table.parameters(), lr=1e-2)
    weights, _, x = inputs_of(0, device, torch.float32)
    ids = torch.tensor([[5, 3, 3], [3, 7, 5]], device=device)
    table.mix(weights, ids, x).sum().backward()
    assert len(table.rows.grad._indices()[0]) == 6  # nobody has asked that there are three
    optimizer.step()
    assert optimizer.state[table.rows]["weights_step"].nonzero().flatten().tolist() == [3, 5, 7]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_who_knows_of_no_padding_finds_the_same_gradient(device: torch.device) -> None:
    table, dense = table_of(device), table_of(device)
    RowAdamW(table.parameters(), lr=1e-2)
    for each in (table, dense):
        each.mix(*inputs_of(0, device, torch.float32)).square().sum().backward()
    assert torch.equal(table.rows.grad.to_dense(), dense.rows.grad)
    assert torch.equal(table.rows.grad.coalesce().to_dense(), dense.rows.grad)
    norm = torch.nn.utils.get_total_norm([table.rows.grad])
    torch.testing.assert_close(norm, dense.rows.grad.norm())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_restricted_gradient_visits_what_is_kept(micro_batches: int, device: torch.device) -> None:
    table, dense = table_of(device), table_of(device)
    optimizer = RowAdamW(table.parameters(), lr=1e-2, lazy=True)
    keep = torch.arange(24, device=device) % 3 == 0
    for part in range(micro_batches):
        for each in (table, dense):
            each.mix(*inputs_of(part, device, torch.float32)).square().sum().backward()
    before = table.read().detach().clone()
    with NoHostReads():
        restrict_gradient(table.rows, keep)
    torch.testing.assert_close(table.rows.grad.to_dense(), dense.rows.grad * keep[:, None, None])
    optimizer.step()
    moved = (table.read().detach() != before).flatten(1).any(1)
    assert torch.equal(moved, keep & dense.rows.grad.flatten(1).any(1))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_where_nothing_is_kept_no_row_is_visited(device: torch.device) -> None:
    table = table_of(device)
    optimizer = RowAdamW(table.parameters(), lr=1e-2, weight_decay=0.1, lazy=True)
    table.mix(*inputs_of(0, device, torch.float32)).sum().backward()
    before = table.read().detach().clone()
    restrict_gradient(table.rows, torch.zeros(24, dtype=torch.bool, device=device))
    optimizer.step()
    assert torch.equal(table.read(), before)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gradient_that_was_made_otherwise_is_not_taken_for_padded(device: torch.device) -> None:
    table = table_of(device)
    RowAdamW(table.parameters(), lr=1e-2)
    table.mix(*inputs_of(0, device, torch.float32)).sum().backward()
    assert padded_ids(table.rows) is not None
    padded = table.rows.grad
    table.rows.grad = torch.sparse_coo_tensor(
        padded._indices().clone(), padded._values(), padded.shape, is_coalesced=False, check_invariants=False
    )
    assert padded_ids(table.rows) is None
