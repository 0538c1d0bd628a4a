"""Where Triton's kernels run, and what they refuse."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.operators import Operators
from peerlm.ops.triton import runtime


def test_the_kernels_are_taken_by_name_alone_where_they_are_interpreted() -> None:
    assert getattr(api._backend("triton"), "automatic") == (not runtime.INTERPRETED)  # noqa: B009


def test_an_explicit_choice_refuses_what_the_kernels_cannot_compute(device: torch.device) -> None:
    values, ids = torch.ones(2, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"backend is 'triton', but .*float64.*choose 'auto'"):
        api.mix_values(torch.ones(2, 3, dtype=torch.float64, device=device), ids, values, backend="triton")
    with pytest.raises(ValueError, match=r"backend is 'triton', but a tensor is on meta"):
        api.mix_values(torch.ones(2, 3, device="meta"), ids, values, backend="triton")


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Callable[..., Tensor]] = {}
    asked: list[Tensor] = []

    def device_of(tensor: Tensor) -> AbstractContextManager[None]:
        asked.append(tensor)
        return nullcontext()

    operators = Operators("peerlm_on_its_gpu")
    library = SimpleNamespace(impl=lambda name, kernel, key: registered.update({name: kernel}))
    monkeypatch.setattr(operators, "_library", library)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    operators.implement({"row_gradients": lambda x, grad_y: grad_y}, "CUDA")
    grad_y = torch.ones(1)
    assert registered["row_gradients"](None, grad_y) is grad_y
    assert len(asked) == 1
    assert asked[0] is grad_y
