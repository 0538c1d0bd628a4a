"""The order of float64 numbers, and ids of experts, as kernels compute them."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.triton.limits import MOST_SUB_KEYS
from peerlm.ops.triton.order import id_of, number_at, place_of, sub_keys_of


def test_places_of_numbers_are_in_their_order(device: torch.device) -> None:
    @triton.jit
    def places(numbers, place, back, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        found = place_of(tl.load(numbers + at))
        tl.store(place + at, found)
        tl.store(back + at, number_at(found))

    inf, nan = float("inf"), float("nan")
    rising = [-inf, -1e300, -2.0, -1.0, -5e-324, -0.0, 0.0, 5e-324, 1.0, 1.0 + 2**-52, 1e300, inf, nan, -nan]
    numbers = torch.tensor([*rising, 3.0, -3.0], dtype=torch.float64, device=device)
    place, back = torch.empty(16, dtype=torch.int64, device=device), torch.empty_like(numbers)
    places[(1,)](numbers, place, back, SIZE=16)
    found = place[:14].tolist()
    assert found == sorted(found)
    assert [i for i in range(13) if found[i] == found[i + 1]] == [5, 12]  # zeros, and NaN
    assert found[0] > -(2**63)  # LOWEST is below minus infinity
    np.testing.assert_array_equal(back.cpu().numpy(), numbers.cpu().numpy())


@pytest.mark.parametrize("n", [1, 7, MOST_SUB_KEYS])
def test_ids_are_those_of_the_pairing_and_back(n: int, device: torch.device) -> None:
    @triton.jit
    def there_and_back(i, j, ids, back_i, back_j, N: tl.constexpr, PAIRING: tl.constexpr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        expert_id = id_of(tl.load(i + at), tl.load(j + at), N, PAIRING)
        tl.store(ids + at, expert_id)
        first, second = sub_keys_of(expert_id, N, PAIRING)
        tl.store(back_i + at, first)
        tl.store(back_j + at, second)

    last = torch.arange(max(0, n - 8), n)  # roots of the highest ids are rounded most
    i, j = (half.flatten() for half in torch.meshgrid(last, torch.cat([last, last.new_zeros(1)]), indexing="ij"))
    i, j = (half.repeat(128)[:128].int().to(device) for half in (i, j))
    for pairing, right in PAIRINGS.items():
        ids, back_i, back_j = (torch.empty(128, dtype=torch.int32, device=device) for _ in range(3))
        there_and_back[(1,)](i, j, ids, back_i, back_j, N=n, PAIRING=pairing, SIZE=128)
        assert torch.equal(ids.long(), right.ids(i.long(), j.long(), n))
        assert torch.equal(back_i, i)
        assert torch.equal(back_j, j)
