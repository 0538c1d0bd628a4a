"""Tensors that move to a larger place, and leave their old one to the system."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peerlm.ops import api
from peerlm.ops.cpu import native

pytestmark = pytest.mark.skipif(bool(native._reason), reason="the native kernels were not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 7), (300_000, 9), (5_000_000,)])
def test_every_byte_arrives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = (torch.arange(torch.Size(shape).numel()) % 101).view(shape).to(dtype)
    expected = source.clone()
    target = torch.full((shape[0] + 3, *shape[1:]), 7, dtype=dtype)
    assert api.move_to_start(source, target)
    assert torch.equal(target[: shape[0]], expected)
    assert (target[shape[0] :] == 7).all()


def test_a_tensor_that_others_share_stays() -> None:
    source = torch.ones(5_000_000)
    view = source[::2]
    assert not api.move_to_start(source, torch.zeros(6_000_000))
    assert view.sum() == 2_500_000
    del view
    assert api.move_to_start(source, torch.zeros(6_000_000))


def test_the_old_pages_are_given_back() -> None:
    source, target = torch.ones(20_000_000), torch.zeros(20_000_000)
    assert api.move_to_start(source, target)
    assert target.min() == 1
    assert source.count_nonzero() < 2**21  # at most the pages at both ends are left


def test_a_smaller_place_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="there is less room than bytes"):
        api.move_to_start(torch.ones(5), torch.ones(4))


def test_an_array_of_numpy_stays() -> None:
    array = np.ones(5_000_000, dtype=np.float32)
    assert not api.move_to_start(torch.from_numpy(array), torch.zeros(6_000_000))
    assert array.sum() == 5_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="which memory is a file's is read from /proc")
def test_a_mapped_file_moves_and_keeps_its_content(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    np.ones(5_000_000, dtype=np.float32).tofile(file)
    target = torch.zeros(6_000_000)
    assert api.move_to_start(torch.from_file(str(file), size=5_000_000), target)
    assert target.sum() == 5_000_000
    assert np.fromfile(file, dtype=np.float32).sum() == 5_000_000
