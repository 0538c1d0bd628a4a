"""Memory with guards: what kernels write beside their outputs, or leave unwritten, is found."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GUARD = 64
_EMPTY = (torch.empty, torch.empty_like, Tensor.new_empty)


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def between_poison(tensor: Tensor) -> Tensor:
    """The same values, contiguous, in the middle of memory full of NaN or of the largest integer."""
    memory = torch.full((tensor.numel() + 2 * _GUARD,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    middle = memory[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    return middle.copy_(tensor.detach())


def assert_guards_kept(tensor: Tensor) -> None:
    """Nothing was written beside a tensor that `between_poison` gave."""
    _assert_guards_kept(tensor.as_strided((tensor.numel() + 2 * _GUARD,), (1,), tensor.storage_offset() - _GUARD))


def _assert_guards_kept(memory: Tensor) -> None:
    for guard in (memory[:_GUARD], memory[-_GUARD:]):
        expected = torch.full_like(guard, _poison(memory.dtype))
        torch.testing.assert_close(guard, expected, rtol=0, atol=0, equal_nan=True)


class Guarded(TorchFunctionMode):
    """Every empty tensor that is asked for within is poisoned, and so are 64 elements on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _EMPTY:
            return result
        poison = _poison(result.dtype)
        memory = torch.full((result.numel() + 2 * _GUARD,), poison, dtype=result.dtype, device=result.device)
        middle = memory[_GUARD : _GUARD + result.numel()].view(result.shape)
        self.given.append((memory, middle))
        return middle

    def assert_kept(self) -> None:
        """Nothing was written beside any of them."""
        assert self.given
        for memory, _ in self.given:
            _assert_guards_kept(memory)
