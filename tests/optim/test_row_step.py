"""Stochastic rounding by itself; the steps are tested through RowAdamW and against the kernels."""

import pytest
import torch

from peerlm.ops.row_updates import RowState
from peerlm.optim import row_step
from peerlm.optim.row_step import mix_bits, round_stochastically

from ..row_tables import KINDS, random_table, step_of, tensors


@pytest.mark.parametrize("value", [1.001, -1.001, 3.1e-5, 1e30])
def test_rounding_is_right_in_the_mean(value: float) -> None:
    number = torch.tensor([value])
    rounded = round_stochastically(number.expand(65536), torch.arange(65536)).double()
    assert rounded.unique().numel() == 2
    assert rounded.mean().item() == pytest.approx(number.double().item(), rel=1e-6)
    low, high = sorted(rounded.unique().tolist())
    assert high - low <= 2**-7 * abs(value)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -2.0])
def test_what_bfloat16_holds_stays(value: float) -> None:
    rounded = round_stochastically(torch.full((3,), value), torch.tensor([0, 1, 65535]))
    assert torch.equal(rounded.view(torch.int16), torch.full((3,), value).bfloat16().view(torch.int16))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
def test_nan_stays_nan(bits: int) -> None:
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(value, torch.tensor([65535])).isnan().all()


def test_infinity_stays_and_the_largest_number_may_become_it() -> None:
    top = torch.finfo(torch.float32).max
    values = round_stochastically(torch.tensor([torch.inf, -torch.inf, top]), torch.tensor([65535, 65535, 65535]))
    assert values.tolist() == [torch.inf, -torch.inf, torch.inf]


def test_bits_are_those_of_murmur3() -> None:
    words = mix_bits(torch.tensor([0, 1, 0xFFFFFFFF]))
    assert words[:2].tolist() == [0, 0x514E28B7]
    assert ((words >= 0) & (words <= 0xFFFFFFFF)).all()


def test_rows_in_places_are_rounded_as_the_rows_that_they_are() -> None:
    whole, order = random_table((2, 8), **KINDS["bf16"]), torch.randperm(40)
    places = RowState(**{name: value[order] for name, value in tensors(whole).items()}, names=order)
    gradient, step = torch.randn(40, 2, 8), step_of(whole)
    row_step.update_rows(whole, torch.arange(40), gradient, step)
    row_step.update_rows(places, torch.arange(40), gradient[order], step)
    for name, value in tensors(whole).items():
        assert torch.equal(value[order], tensors(places)[name]), name
