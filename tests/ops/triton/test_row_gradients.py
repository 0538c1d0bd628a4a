"""Gradients of rows over sorted entries: chunks of long segments, padding, ids of no row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops import reference_operators
from peerlm.ops.triton.row_gradients import CHUNK, padded_gradients, sum_by_row
from peerlm.ops.triton.runtime import OPERATORS
from peerlm.testing import assert_within_budget

Arguments = tuple[Tensor | None, Tensor, Tensor, Tensor]


def draw(
    tokens: int, per_token: int, dim: int, num_rows: int, parts: int, *, zipf: bool = False, seed: int = 0
) -> Arguments:
    """x, grad_y, ids and coefficients; by Zipf's law the i-th row is i times as rare as the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator) if parts > 1 else None
    ids = torch.randint(num_rows, (tokens, per_token), generator=generator)
    if zipf:
        shares = 1 / torch.arange(1.0, num_rows + 1)
        ids = shares.multinomial(ids.numel(), replacement=True, generator=generator).view_as(ids)
    grad_y = torch.randn(tokens, dim, generator=generator)
    return x, grad_y, ids, torch.randn(tokens, per_token, parts, generator=generator)


def defined(arguments: Arguments, num_rows: int, dtype: torch.dtype) -> Tensor:
    x, grad_y, ids, coefficients = arguments
    return reference_operators.KERNELS["row_gradients"](  # type: ignore[return-value]
        None if x is None else x.to(dtype), grad_y.to(dtype), ids, coefficients.to(dtype), num_rows
    )


def assert_right(arguments: Arguments, num_rows: int) -> None:
    """Dense, by row and padded, with one number for the same thing everywhere."""
    dense = OPERATORS.ops.row_gradients(*arguments, num_rows)
    assert_within_budget(
        dense, defined(arguments, num_rows, torch.float32), defined(arguments, num_rows, torch.float64)
    )
    occur = arguments[2].unique()
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[occur] = False
    assert not dense[untouched].any()
    found, padded = padded_gradients(*arguments, num_rows)
    assert len(found) == len(padded) == min(arguments[2].numel(), num_rows)
    assert torch.equal(found[: len(occur)], occur)
    assert (found[len(occur) :] == -1).all()
    assert torch.equal(padded[: len(occur)], dense[occur])
    assert not padded[len(occur) :].any()


@given(
    tokens=st.integers(0, 12),
    per_token=st.integers(0, 9),
    dim=st.integers(1, 40),
    num_rows=st.integers(1, 30),
    parts=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, 1, 0)
@settings(max_examples=12, deadline=None)
def test_any_shape(tokens: int, per_token: int, dim: int, num_rows: int, parts: int, seed: int) -> None:
    assert_right(draw(tokens, per_token, dim, num_rows, parts, seed=seed), num_rows)


@pytest.mark.parametrize("dim", [1024, 1025, 2050])
@pytest.mark.parametrize("parts", [1, 3])
def test_wide_rows(parts: int, dim: int) -> None:
    assert_right(draw(3, 3, dim, 4, parts), 4)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("tokens", [CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_segments_of_more_than_a_chunk(tokens: int, parts: int) -> None:
    assert_right(draw(tokens, 1, 3, 1, parts), 1)


def test_few_rows_have_most_of_the_entries() -> None:
    arguments = draw(550, 3, 5, 12, 2, zipf=True)
    assert arguments[2].flatten().bincount()[1] > CHUNK
    assert_right(arguments, 12)


@pytest.mark.parametrize(
    "lengths", [(257, 257), (1, 257, 300, 256, 513), (100, 700, 2, 257), (256, 256, 257, 255, 258)]
)
def test_each_chunk_has_a_place_of_its_own(lengths: tuple[int, ...]) -> None:
    """Segments of these lengths, one after the other; all numbers are whole, so that sums are exact."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids))][:, None]
    grad_y = torch.randint(-99, 100, (len(ids), 2)).float()
    coefficients = torch.randint(-9, 10, (len(ids), 1, 1)).float()
    expected = defined((None, grad_y, ids, coefficients), len(lengths), torch.float64)
    found = OPERATORS.ops.row_gradients(None, grad_y, ids, coefficients, len(lengths))
    assert torch.equal(found.double(), expected)


def test_entries_of_no_row_add_to_none() -> None:
    x, grad_y, ids, coefficients = draw(7, 4, 5, 6, 2)
    for wrong in (-1, 6, 2**32 + 1):
        changed, without = ids.clone(), coefficients.clone()
        changed[3, 1] = wrong
        without[3, 1] = 0
        expected = OPERATORS.ops.row_gradients(x, grad_y, ids, without, 6)
        assert torch.equal(OPERATORS.ops.row_gradients(x, grad_y, changed, coefficients, 6), expected)


def test_the_same_bits_in_every_run() -> None:
    arguments = draw(400, 2, 9, 10, 2, zipf=True)
    first, second = (OPERATORS.ops.row_gradients(*arguments, 10) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("parts", [1, 2])
def test_operators_are_as_pytorch_wants_them(parts: int) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPERATORS.ops.row_gradients.default, (*draw(3, 2, 4, 5, parts), 5), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_equal_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    ids = torch.tensor([4] * 700 + [-1, 2, 9])
    values = torch.ones(len(ids), 2, 3, dtype=dtype)
    values[0] = 1000  # of which bfloat16 knows no successor: a sum of later chunks in it would be lost
    found, sums = sum_by_row(ids, values, 6)
    assert found.tolist() == [2, 4, -1, -1, -1, -1]
    assert sums.dtype == dtype
    assert torch.equal(sums, torch.tensor([1, 1699, 0, 0, 0, 0]).to(dtype)[:, None, None].expand(6, 2, 3))
