"""What layers with a large table of rows have in common: its memory, and the optimizer that may watch it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.ops import api
from peerlm.ops.row_updates import prepare_rows


def empty_rows(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised rows, (N, ...), in torch's default dtype or another; in huge pages where the system grants them."""
    rows = torch.empty(shape, dtype=dtype)
    api.use_huge_pages(rows)
    return rows


class RowTable(nn.Module):
    """A module with a parameter of rows that an optimizer may watch (`ops/row_updates.py`).

    Before it evaluates, is saved or is loaded, all rows are brought up to date. Subclasses name the parameter, and call
    `prepare_rows` for those that they are about to read.
    """

    rows_name: ClassVar[str] = "rows"

    def train(self, mode: bool = True) -> "RowTable":
        """As `nn.Module.train`; on leaving training all rows are brought up to date."""
        if not mode:
            prepare_rows(getattr(self, self.rows_name), None)
        return super().train(mode)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        prepare_rows(getattr(self, self.rows_name), None)
        super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        prepare_rows(getattr(self, self.rows_name), None)
        super()._load_from_state_dict(*arguments, **options)
