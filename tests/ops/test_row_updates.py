"""The seam between readers of rows and optimizers, with a watcher that writes down what it is told."""

import torch
from torch import Tensor, nn

from peerlm.ops.row_updates import RowState, RowStep, fused_row_update, prepare_rows, wants_row_gradients, watch_rows


class Notebook:
    def __init__(self) -> None:
        self.entries: list[object] = []

    def before_read(self, parameter: Tensor, ids: Tensor | None) -> None:
        self.entries.append("all" if ids is None else ids.tolist())

    def takes_row_gradients(self, parameter: Tensor) -> bool:
        return True

    def fused_update(self, parameter: Tensor) -> tuple[RowState, RowStep] | None:
        return None

    def release(self, parameter: Tensor) -> None:
        self.entries.append("released")


def test_nobody_watches() -> None:
    table = nn.Parameter(torch.ones(3, 2))
    prepare_rows(table, torch.tensor([1]))
    prepare_rows(table, None)
    assert not wants_row_gradients(table)
    assert fused_row_update(table) is None


def test_a_watcher_learns_of_reads_until_another_takes_over() -> None:
    table, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    first, second = Notebook(), Notebook()
    watch_rows(table, first)
    prepare_rows(table, torch.tensor([[1, 1], [2, 0]]))
    prepare_rows(other, None)
    assert first.entries == [[[1, 1], [2, 0]]]
    assert wants_row_gradients(table)
    assert not wants_row_gradients(other)
    watch_rows(table, first)
    watch_rows(table, second)
    prepare_rows(table, None)
    assert first.entries[1:] == ["released"]
    assert second.entries == ["all"]
