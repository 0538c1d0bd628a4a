"""Rows of a loaded model on the host, such as files that `from_pretrained` maps: read by a device's cache alone."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


class LoadedRows:
    """What a `RowCache` fetches rows from; tensors (N, ...) by name, on the CPU."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> Tensor:
        """All rows."""
        return self.tensors[name]

    def use(self, ids: Tensor, *, training: bool) -> None:
        """The system reads pages when they are asked for."""

    def require(self, size: int) -> None:
        """Nothing is kept."""

    def before_change(self, ids: Tensor | None) -> None:
        """Rows are written by their table alone, as they may be."""

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> NoReturn:
        """Refused: nothing would keep it."""
        raise RuntimeError(
            "rows of a loaded model are read alone while a device caches them: to train them, make the model with "
            "tables in files (tables.folder, or layers.mapped.table.mapped_in), whose folder may be on tmpfs"
        )

    def put_state(self, name: str, values: Tensor) -> NoReturn:
        """Refused."""
        self.new_state(name, values.shape, values.dtype)

    def kept_state(self, name: str) -> Tensor | None:
        """There is none."""
        return None
