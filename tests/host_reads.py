"""A stand-in for a GPU that must not be waited for: on the CPU, whatever would make the host wait raises."""

from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peerlm.optim.placed import Placed

aten = torch.ops.aten
_WAIT = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._coalesce,
    aten.bincount,
    aten.repeat_interleave,
}


class NoHostReads(TorchDispatchMode):
    """Within this context operations whose result, or its shape, the host has to learn from the device raise.

    What RowAdamW computes on the host, and sends to the device, is left alone.
    """

    def __enter__(self) -> "NoHostReads":
        self._patches = [
            mock.patch.object(Placed, name, _on_the_host(getattr(Placed, name))) for name in ("step", "rules")
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run an operation that does not wait."""
        packet = function.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if packet in _WAIT or masks:
            self.waits(function)
        return function(*arguments, **(options or {}))

    def waits(self, function: Any) -> None:
        """An operation waits."""
        raise AssertionError(f"{function} waits for the device")


class HostReads(NoHostReads):
    """Counts them."""

    count = 0

    def waits(self, function: Any) -> None:
        """An operation waits."""
        self.count += 1


def _on_the_host(function: Any) -> Any:
    @wraps(function)
    def computed(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return computed
