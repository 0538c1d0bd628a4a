"""Where Triton's kernels run, and what they refuse."""

import pytest
import torch

from peerlm.ops import api
from peerlm.ops.triton import runtime


def test_the_kernels_are_taken_by_name_alone_where_they_are_interpreted() -> None:
    assert getattr(api._backend("triton"), "automatic") == (not runtime.INTERPRETED)  # noqa: B009


def test_an_explicit_choice_refuses_what_the_kernels_cannot_compute(device: torch.device) -> None:
    values, ids = torch.ones(2, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"backend is 'triton', but .*float64.*choose 'auto'"):
        api.mix_values(torch.ones(2, 3, dtype=torch.float64, device=device), ids, values, backend="triton")
    with pytest.raises(ValueError, match=r"backend is 'triton', but a tensor is on meta"):
        api.mix_values(torch.ones(2, 3, device="meta"), ids, values, backend="triton")
