"""A total order of float64 numbers inside kernels, and which expert two sub-keys make."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))
"""Below the place of every number."""

_MAGNITUDE = tl.constexpr(2**63 - 1)


@triton.jit
def place_of(number):
    """An int64 that grows with a float64 number: zeros are equal, NaN is the highest and as high as NaN."""
    bits = (number + 0.0).to(tl.int64, bitcast=True)  # -0.0 becomes 0.0
    place = tl.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return tl.where(number != number, _MAGNITUDE, place)


@triton.jit
def number_at(place):
    """The float64 number of a place."""
    return tl.where(place < 0, place ^ _MAGNITUDE, place).to(tl.float64, bitcast=True)


@triton.jit
def id_of(i, j, N: tl.constexpr, PAIRING: tl.constexpr):
    """The id of the expert of int32 sub-keys i and j; it grows with each of them."""
    if PAIRING == "row-major":
        return i * N + j
    return tl.where(i < j, j * j + i, i * i + i + j)


@triton.jit
def sub_keys_of(expert_id, N: tl.constexpr, PAIRING: tl.constexpr):
    """The sub-keys i and j of an int32 id below N * N."""
    if PAIRING == "row-major":
        return expert_id // N, expert_id % N
    shell = tl.sqrt(expert_id.to(tl.float32)).to(tl.int32)  # one too many or too few where the root is rounded
    shell -= (shell * shell > expert_id).to(tl.int32)
    shell += ((shell + 1) * (shell + 1) <= expert_id).to(tl.int32)
    rest = expert_id - shell * shell
    return tl.where(rest < shell, rest, shell), tl.where(rest < shell, shell, rest - shell)
