"""Entries sorted by row: runs, padding, and ids of no row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops.triton.segments import _BLOCK, Segments, segments


def assert_as_defined(found: Segments, ids: Tensor, num_rows: int) -> None:
    """What Python's own sort makes of the entries."""
    flat = ids.flatten().tolist()
    inside = sorted((i for i, row in enumerate(flat) if 0 <= row < num_rows), key=flat.__getitem__)
    rows = sorted({flat[i] for i in inside})
    starts = [next(place for place, i in enumerate(inside) if flat[i] == row) for row in rows]
    assert found.order.tolist()[: len(inside)] == inside
    assert sorted(found.order.tolist()) == list(range(len(flat)))
    assert found.count.tolist() == [len(rows)]
    assert found.ids.tolist() == rows + [-1] * (len(flat) - len(rows))
    assert found.starts.tolist() == starts + [len(inside)] * (len(flat) + 1 - len(rows))
    dtypes = [each.dtype for each in (found.order, found.ids, found.starts, found.count)]
    assert dtypes == [torch.int32, torch.int64, torch.int32, torch.int32]


@given(
    tokens=st.integers(0, 40),
    per_token=st.integers(0, 9),
    num_rows=st.integers(1, 60),
    beyond=st.sampled_from([0, 3, 2**40]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(tokens: int, per_token: int, num_rows: int, beyond: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-beyond, num_rows + beyond, (tokens, per_token), generator=generator)
    assert_as_defined(segments(ids, num_rows), ids, num_rows)


@pytest.mark.parametrize("num_rows", [1, 7, 2**31 - 1])
@pytest.mark.parametrize("entries", [_BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK])
def test_more_than_one_block(entries: int, num_rows: int, device: torch.device) -> None:
    ids = torch.randint(num_rows, (entries, 1), device=device)
    assert_as_defined(segments(ids, num_rows), ids, num_rows)


@pytest.mark.parametrize("ids", [[[-1, 5]], [[2**32]], [[-(2**63)]]])
def test_no_id_is_of_a_row(ids: list[list[int]], device: torch.device) -> None:
    wrong = torch.tensor(ids, device=device)
    assert_as_defined(segments(wrong, 5), wrong, 5)


def test_too_many(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"2147483648 rows of a table are too many; .* take up to 2147483647"):
        segments(torch.zeros(1, 1, dtype=torch.int64, device=device), 2**31)
    with pytest.raises(ValueError, match=r"1073741825 entries of tokens are too many; .* take up to 1073741824"):
        segments(torch.zeros(1, 1, dtype=torch.int64, device=device).expand(2**30 + 1, 1), 5)
