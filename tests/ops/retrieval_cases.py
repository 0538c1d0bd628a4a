"""Queries and sub-keys of every kind, that kernels of retrieval are tested with."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops.pairing import PAIRINGS

FEW_TOKENS = 4
"""Up to here the CPU's kernels take another path."""


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def _repeated(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows of which many are the same."""
    rows = _normal(generator, *shape)
    return rows[..., torch.randint(0, (shape[-2] + 2) // 3, (shape[-2],), generator=generator), :]


def _nearly_equal(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows that differ by a few roundings of float32, far below one of bfloat16."""
    return _normal(generator, *shape[:-2], 1, shape[-1]) * (1 + 3e-7 * _normal(generator, *shape))


def _magnitudes(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows of sizes from 1e-15 to 1e15."""
    return _normal(generator, *shape) * 10.0 ** torch.randint(-15, 16, (*shape[:-1], 1), generator=generator)


KINDS = {
    "normal": (_normal, 1.0, _normal, 1.0),
    "integers that tie": (_integers, 1.0, _integers, 1.0),
    "equal sub-keys": (_normal, 1.0, _repeated, 1.0),
    "nearly equal sub-keys": (_normal, 1.0, _nearly_equal, 1.0),
    "all magnitudes": (_normal, 1.0, _magnitudes, 1.0),
    "large": (_normal, 1e18, _nearly_equal, 1e18),
    "larger than float32": (_normal, 1e25, _nearly_equal, 1e25),
    "squares overflow": (_normal, 1e-25, _nearly_equal, 1e25),
    "small": (_normal, 1e-18, _nearly_equal, 1e-18),
    "squares underflow": (_normal, 1e-24, _nearly_equal, 1e10),
    "squares of sub-keys underflow": (_normal, 1e10, _nearly_equal, 1e-24),
    "denormal queries": (_normal, 1e-40, _nearly_equal, 1e20),
    "denormal sub-keys": (_normal, 1e20, _normal, 1e-40),
    "near the largest": (_normal, 1e-20, _nearly_equal, 7e37),
    "zero": (_normal, 0.0, _normal, 1.0),
}
"""Queries and how large they are, sub-keys and how large they are."""

what_does_not_fit = pytest.mark.parametrize(
    ("query", "sub_keys", "k"),
    [
        (torch.ones(3, 2, 8), torch.ones(2, 1, 6, 4), 7),
        (torch.ones(3, 2, 8), torch.ones(2, 1, 6, 4), 0),
        (torch.ones(3, 2, 8), torch.ones(2, 1, 6, 3), 2),
        (torch.ones(3, 2, 8), torch.ones(2, 3, 6, 4), 2),
        (torch.ones(3, 2, 8), torch.ones(3, 1, 6, 4), 2),
    ],
    ids=["k > n", "k = 0", "size of sub-keys", "heads", "halves"],
)
"""Marks a test of a query (3, 2, 8), of sub-keys and of a k that do not belong together."""


@st.composite
def cases(
    draw: st.DrawFn, max_n: int = 40, max_tokens: int = 50, max_half: int = 40
) -> tuple[Tensor, Tensor, int, str]:
    """Queries (T, H, 2 C), sub_keys (2, H or 1, n, C), k and a pairing."""
    n, heads, half = draw(st.integers(1, max_n)), draw(st.integers(1, 3)), draw(st.integers(1, max_half))
    tokens = draw(st.one_of(st.integers(1, FEW_TOKENS), st.integers(FEW_TOKENS + 1, max_tokens)))
    k = draw(st.one_of(st.integers(1, n), st.just(n)))
    key_heads = draw(st.sampled_from([1, heads]))
    draw_query, query_size, draw_keys, keys_size = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    query = draw_query(generator, tokens, heads, 2 * half) * query_size
    pairing = draw(st.sampled_from(sorted(PAIRINGS)))
    return query, draw_keys(generator, 2, key_heads, n, half) * keys_size, k, pairing


def against_bfloat16(tokens: int, n: int) -> tuple[Tensor, Tensor]:
    """Queries (T, 1, 32) and sub_keys (2, 1, n, 16) that bfloat16 misjudges as much as it can.

    The best sub-key, the first, loses most by rounding, itself and what it meets in the query; the next three are
    hardly worse, and gain as much. All others are zero.
    """
    half_ulp, little = 2.0**-8, 2.0**-18
    down, up = 1 + half_ulp - little, 1 + half_ulp + little
    query = torch.tensor([*[down] * 8, *[up] * 8]).repeat(tokens, 1, 2)
    sub_keys = torch.zeros(2, 1, n, 16)
    sub_keys[..., 0, :8] = down
    sub_keys[..., 1:4, 8:15] = up
    sub_keys[..., 1:4, 15] = 1 - half_ulp / 2 + little
    return query, sub_keys
