"""Rows in places of a device are trained by the Triton kernels, and rounded at random, as in a table in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm.layers import ExpertTable
from peerlm.layers.mapped.cached import cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in
from peerlm.layers.table import tables_as
from peerlm.ops.operators import PEERLM
from peerlm.ops.triton import row_steps
from peerlm.ops.triton.fused_update import update_by_gradients
from peerlm.optim import RowAdamW


@pytest.mark.whole_tables("makes tables in files and tables in memory itself")
@pytest.mark.parametrize("settings", [{"betas": (0.0, 0.9)}, {"fused": True, "lazy": True, "row_wise": True}], ids=str)
def test_a_training_has_the_bits_of_a_table_in_memory(
    settings: dict[str, Any], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: row_steps)
    monkeypatch.setattr("peerlm.ops.triton.kernels.automatic", True)
    monkeypatch.setattr(PEERLM, "_fused_updates", {device.type: update_by_gradients})
    place = RowPlace(tmp_path / "rows")

    def trained(places: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with tables_as(mapped_in(place) if places else ExpertTable):
            table = ExpertTable(12, 4, backend="triton", row_format="bfloat16")
        table.write(torch.randn(12, 2, 4, generator=generator))
        if places:
            assert cache_tables(table, device, places) == [""]
        table.to(device)
        optimizer = RowAdamW(table.parameters(), lr=0.1, weight_decay=0.1, **settings)
        for _ in range(3):
            ids = torch.randint(0, 12, (2, 2), generator=generator)
            x, weights = (torch.randn(2, size, generator=generator).to(device) for size in (4, 2))
            table.mix(weights, ids.to(device), x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return table.read().cpu()

    assert torch.equal(trained(4), trained(0))
    place.close()
