"""A table in parts, each trained by an optimizer of its own, has the bits of the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm.ops.row_shards import RowShard, hold_shard
from peerlm.optim import RowAdamW
from peerlm.parallel.layout import RowLayout

LAYOUT = RowLayout(segments=(9, 4), width=256, rows=2, cols=2)
STEPS = 4


def drawn(number: int) -> tuple[Tensor, Tensor]:
    """Rows with a gradient in a step, and their gradients."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randperm(LAYOUT.num_rows, generator=generator)[:6].sort().values
    return ids, torch.randn(6, 2, LAYOUT.width, generator=generator)


def trained(layout: RowLayout, row_rank: int, column_rank: int, dtype: torch.dtype, **settings: Any) -> Tensor:
    """A rank's part of the table after some steps, with all that the optimizer keeps, as one tensor by row."""
    start = torch.randn(LAYOUT.num_rows, 2, LAYOUT.width, generator=torch.Generator().manual_seed(9)).to(dtype)
    column, width = layout.columns(column_rank)
    pieces = layout.pieces(row_rank)
    numbers = torch.cat([torch.arange(piece.first, piece.first + piece.count) for piece in pieces])
    table = nn.Parameter(start[numbers, :, column : column + width].clone())
    if layout.rows * layout.cols > 1:
        shard = RowShard(
            group=None,
            firsts=torch.tensor([piece.local for piece in pieces]),
            shifts=torch.tensor([piece.first - piece.local for piece in pieces]),
            column=column,
            width=layout.width,
        )
        hold_shard(table, shard)
    optimizer = RowAdamW([{"params": [table], "name": "table"}], lr=1e-2, **settings)
    for number in range(STEPS):
        ids, gradients = drawn(number)
        here = [(local, gradient) for local, row in enumerate(numbers) for gradient in gradients[ids == row]]
        local_ids = torch.tensor([[local for local, _ in here]], dtype=torch.int64)
        own = torch.stack([gradient for _, gradient in here])[:, :, column : column + width]
        table.grad = torch.sparse_coo_tensor(local_ids, own.to(dtype), table.shape, check_invariants=True)
        optimizer.step()
    optimizer.catch_up()
    state = optimizer.state[table]
    kept = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
    return torch.cat([each.float().reshape(len(table), -1) for each in (table.detach(), *kept)], dim=1)


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"dtype": torch.float32, "weight_decay": 0.1},
    "bfloat16": {"dtype": torch.bfloat16, "lazy": True, "state_dtype": torch.bfloat16},
    "no first moment, one second for 128 columns": {
        "dtype": torch.bfloat16,
        "betas": (0.0, 0.98),
        "row_wise": 128,
    },
    "one second for 128 columns": {"dtype": torch.float32, "row_wise": 128, "weight_decay": 0.1},
}


@pytest.fixture(params=["native", "definition"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "definition":
        monkeypatch.setattr("peerlm.ops.api.row_kernels", lambda table: None)
    return str(request.param)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("rows", "cols"), [(2, 1), (1, 2), (2, 2)])
def test_parts_have_the_bits_of_the_whole(setting: str, rows: int, cols: int) -> None:
    whole = trained(RowLayout(segments=LAYOUT.segments, width=256), 0, 0, **SETTINGS[setting])
    layout = RowLayout(segments=LAYOUT.segments, width=256, rows=rows, cols=cols)
    found = torch.full_like(whole, torch.nan)
    for row_rank in range(rows):
        numbers = torch.cat([torch.arange(each.first, each.first + each.count) for each in layout.pieces(row_rank)])
        for column_rank in range(cols):
            part = trained(layout, row_rank, column_rank, **SETTINGS[setting])
            sizes = [512, *([512] if "betas" not in SETTINGS[setting] else [])]
            sizes.append(whole.shape[1] - sum(sizes))
            starts = [sum(sizes[:number]) for number in range(len(sizes))]
            chosen = [  # of each kept tensor (n, 2, W) the share of this rank's columns
                start + torch.arange(size).view(2, cols, -1)[:, column_rank].flatten()
                for start, size in zip(starts, sizes, strict=True)
            ]
            columns = torch.cat(chosen)
            found[numbers[:, None], columns[None]] = part
    assert torch.equal(found, whole)


def test_native_and_defined_second_moments_of_128_columns_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RowLayout(segments=LAYOUT.segments, width=256)
    settings = SETTINGS["one second for 128 columns"]
    native = trained(layout, 0, 0, **settings)
    monkeypatch.setattr("peerlm.ops.api.row_kernels", lambda table: None)
    torch.testing.assert_close(native, trained(layout, 0, 0, **settings), rtol=1e-5, atol=1e-6)
    by_row = trained(layout, 0, 0, dtype=torch.float32, row_wise=True, weight_decay=0.1)
    assert not torch.allclose(native[:, :512], by_row[:, :512], atol=1e-4)


def test_numbers_of_columns_that_cannot_share_a_moment_are_refused() -> None:
    table = nn.Parameter(torch.zeros(3, 2, 100))
    with pytest.raises(ValueError, match="100 columns, which 128 does not divide"):
        RowAdamW([{"params": [table], "name": "table"}], row_wise=128)
    hold_shard(
        table, RowShard(group=None, firsts=torch.zeros(1).long(), shifts=torch.zeros(1).long(), column=0, width=200)
    )
    with pytest.raises(ValueError, match="this rank has 100 of a table's 200 columns"):
        RowAdamW([{"params": [table], "name": "table"}], row_wise=True)
