"""The id -1 is a hole: what other ranks hold of a token's rows adds nothing here."""

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.row_updates import RowState
from peerlm.optim import row_step
from peerlm.testing import assert_within_budget, mix_inputs

from .mixing_cases import in_float32

BACKENDS = ("cpu", "reference", "bag")


def holed(ids: Tensor) -> Tensor:
    """Holes at both ends of tokens and between, a token of nothing else, one without any."""
    hole = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    hole[0], hole[1], hole[2, 0], hole[2, -1] = True, False, True, True
    return torch.where(hole, -1, ids)


def results(backend: str, ids: Tensor, weights: Tensor, gated: bool, row_gradients: bool) -> dict[str, Tensor]:
    """Output and gradients; of weights where `ids` names no row, 0 is expected."""
    inputs = in_float32(mix_inputs(5, 21, 8, 12, gated=gated))
    leaves = [inputs.x, weights.clone().requires_grad_(), inputs.rows]
    y = api.mix_experts(leaves[0], leaves[1], ids, leaves[2], backend=backend, row_gradients=row_gradients)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    rows = leaves[2].grad
    assert rows is not None
    return {"y": y.detach(), "x": leaves[0].grad, "weights": leaves[1].grad, "rows": rows.to_dense()}  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_gradients", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_hole_is_a_row_of_weight_zero_whose_weight_has_no_gradient(
    backend: str, row_gradients: bool, gated: bool
) -> None:
    if backend == "bag" and row_gradients:
        pytest.skip("embedding bags have no sparse row gradients")
    inputs = in_float32(mix_inputs(5, 21, 8, 12, gated=gated))
    ids = holed(inputs.ids)
    weights = inputs.weights.detach()
    found = results(backend, ids, weights, gated, row_gradients)
    expected = results("reference", ids.clamp(min=0), weights.masked_fill(ids < 0, 0), gated, False)
    expected["weights"] = expected["weights"].masked_fill(ids < 0, 0)
    assert bool((found["weights"][ids < 0] == 0).all())
    assert bool((found["y"][0] == 0).all())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_inner_products_have_holes_too(backend: str) -> None:
    inputs = in_float32(mix_inputs(5, 21, 8, 12))
    ids, values = holed(inputs.ids), inputs.rows.detach()[:, 0].contiguous().requires_grad_()
    weights = inputs.weights.detach()
    dots = api.dot_values(inputs.x.detach(), ids, values, backend=backend)
    named = torch.einsum("td,tpd->tp", inputs.x.detach(), values[ids.clamp(min=0)]).masked_fill(ids < 0, 0)
    torch.testing.assert_close(dots, named)
    mixed = api.mix_values(weights, ids, values, backend=backend)
    zeroed = weights.masked_fill(ids < 0, 0)
    torch.testing.assert_close(mixed, torch.einsum("tp,tpd->td", zeroed, values[ids.clamp(min=0)]))
    (found,) = torch.autograd.grad((dots.sum() + mixed.sum()), [values])
    (expected,) = torch.autograd.grad(
        named.sum() + torch.einsum("tp,tpd->", zeroed, values[ids.clamp(min=0)]), [values]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_without_rows_gives_zeros_and_an_empty_gradient(backend: str) -> None:
    x, weights = torch.ones(3, 4, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    rows, ids = torch.empty(0, 2, 4, requires_grad=True), torch.full((3, 2), -1)
    if backend == "bag":
        with pytest.raises(ValueError, match="need a table with rows"):
            api.mix_experts(x, weights, ids, rows, backend=backend)
        return
    y = api.mix_experts(x, weights, ids, rows, backend=backend, row_gradients=True)
    y.sum().backward()
    assert bool((y == 0).all())
    assert rows.grad is not None
    assert rows.grad.is_sparse
    assert rows.grad._nnz() == 0
    assert_within_budget({"x": x.grad}, {"x": torch.zeros(3, 4)}, {"x": torch.zeros(3, 4, dtype=torch.float64)})  # type: ignore[dict-item]


def test_a_hole_is_no_stale_row() -> None:
    from peerlm.ops.cpu import rows as native

    table = RowState(
        rows=torch.zeros(600, 4),
        exp_avg=torch.zeros(600, 4),
        exp_avg_sq=torch.zeros(600, 4),
        moments_step=torch.zeros(600, dtype=torch.int32),
        weights_step=(torch.arange(600) % 2).int(),
    )
    for ids in (torch.tensor([[-1, 4], [4, 5]]), torch.arange(-1, 40)[None]):
        expected = [row for row in sorted(set(ids.flatten().tolist())) if row >= 0 and row % 2 == 0]
        assert row_step.rows_behind(table, ids, 1).tolist() == expected
        assert native.rows_behind(table, ids, 1).tolist() == expected
