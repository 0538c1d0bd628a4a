from pathlib import Path

import pytest
import torch

from peerlm.ops.api import dot_values
from peerlm.ops.cpu import native

from ..fresh import python

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

ROWS = 4096  # of (2, 256) float32: 8 MiB


def test_memory_of_a_dead_tensor_serves_the_next() -> None:
    first = native.recycled(ROWS, 2, 256)
    place = first.data_ptr()
    del first
    second = native.recycled(ROWS + 50, 2, 256)  # a few more rows, as the next step has them
    assert second.data_ptr() == place
    assert second.shape == (ROWS + 50, 2, 256)
    assert second.dtype == torch.float32


def test_living_tensors_never_share_memory() -> None:
    alive = [native.recycled(ROWS, 2, 256).fill_(number) for number in range(4)]
    view = alive[0][7:9]
    del alive[0]
    alive.append(native.recycled(ROWS, 2, 256).fill_(9))
    assert view.unique().tolist() == [0]  # a view keeps the memory of the tensor it came from
    assert [tensor.unique().tolist() for tensor in alive] == [[1], [2], [3], [9]]


def test_much_smaller_tensors_leave_large_memory_alone() -> None:
    large = native.recycled(4 * ROWS, 2, 256)
    place = large.data_ptr()
    del large
    assert native.recycled(ROWS, 2, 256).data_ptr() != place


# In a process of its own: what other tests left free would be taken in place of new memory.
UNWANTED = """
from pathlib import Path
import resource
from peerlm.ops.cpu import native

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

native.recycled({rows}, 2, 256)
before = resident()
large = native.recycled(32 * {rows}, 2, 256).fill_(1)  # 256 MiB
del large
kept = resident() - before
for _ in range(66):
    native.recycled({rows}, 2, 256)
print(kept, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_that_nobody_wants_goes_back_to_the_system(tmp_path: Path) -> None:
    code = UNWANTED.format(rows=ROWS)
    done = python(code, tmp_path)
    kept, left = map(int, done.stdout.split())
    assert kept > 200 * 2**20
    assert left < 100 * 2**20


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_small_tensors_are_torchs_own(rows: int) -> None:
    assert native.recycled(rows, 3, 5).shape == (rows, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_rows_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, ids, grad_y = torch.randn(5, 8), torch.randint(16, (5, 4)), torch.randn(5, 4)
    found = []
    for default in (torch.float32, dtype):
        values = torch.ones(16, 8, requires_grad=True)
        torch.set_default_dtype(default)
        try:
            dot_values(x, ids, values, backend="cpu", row_gradients=True).backward(grad_y)
        finally:
            torch.set_default_dtype(torch.float32)
        assert values.grad is not None
        found.append(values.grad.to_dense())
    assert torch.equal(*found)
