"""The held-out split: the share of bytes is near what was asked for, equal documents stay together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlm.data.split import choose_heldout, document_key
from peerlm.errors import UserError

HOLDOUTS = st.floats(0.001, 0.999)
DOCUMENTS = st.dictionaries(st.integers(0, 2**64 - 1), st.integers(1, 10**6), min_size=2, max_size=60)


@given(DOCUMENTS, HOLDOUTS)
def test_neither_side_is_empty(sizes: dict[int, int], holdout: float) -> None:
    chosen = choose_heldout(list(sizes), list(sizes.values()), holdout)
    assert chosen <= set(sizes)
    assert 0 < len(chosen) < len(sizes)


@given(DOCUMENTS, HOLDOUTS)
def test_share_of_bytes(sizes: dict[int, int], holdout: float) -> None:
    """Never above the asked share, save for one smallest document; below by less than twice the largest."""
    chosen = choose_heldout(list(sizes), list(sizes.values()), holdout)
    asked, held = holdout * sum(sizes.values()), sum(sizes[key] for key in chosen)
    assert held <= asked + 1e-6 or (len(chosen) == 1 and held == min(sizes.values()))
    assert held > asked - (1 + holdout) * max(sizes.values()) - 1e-6


def test_share_is_near_for_very_unequal_documents() -> None:
    generator = np.random.default_rng(0)
    sizes = [
        *generator.integers(100_000, 650_000, 31).tolist(),
        *generator.integers(1_000, 8_000, 261).tolist(),
    ]
    for seed in range(50):
        keys = np.random.default_rng(seed).integers(0, 2**63, len(sizes)).tolist()
        chosen = choose_heldout(keys, sizes, 0.02)
        share = sum(size for key, size in zip(keys, sizes, strict=True) if key in chosen) / sum(sizes)
        assert 0.019 < share <= 0.02


def test_every_size_class_gives_its_share() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 3000)
    sizes = np.repeat([10, 100, 1000], 1000)
    chosen = choose_heldout(keys.tolist(), sizes.tolist(), 0.1)
    held = np.isin(keys, list(chosen)).reshape(3, 1000).sum(1)
    assert (np.abs(held - 100) * [10, 100, 1000] <= 1.1 * 1000).all()


def test_size_within_a_class_is_of_no_account() -> None:
    generator = np.random.default_rng(0)
    keys, sizes = generator.integers(0, 2**63, 20_000), generator.integers(512, 1024, 20_000)
    chosen = choose_heldout(keys.tolist(), sizes.tolist(), 0.1)
    mean, error = sizes.mean(), sizes.std() / len(chosen) ** 0.5
    assert abs(sizes[np.isin(keys, list(chosen))].mean() - mean) < 4 * error


@given(DOCUMENTS, HOLDOUTS, st.randoms(use_true_random=False))
def test_order_of_documents_is_of_no_account(sizes: dict[int, int], holdout: float, random: object) -> None:
    keys = list(sizes)
    random.shuffle(keys)  # type: ignore[attr-defined]
    assert choose_heldout(keys, [sizes[key] for key in keys], holdout) == choose_heldout(
        list(sizes), list(sizes.values()), holdout
    )


def test_copies_count_as_one_document_of_their_total() -> None:
    assert choose_heldout([1, 2, 1, 3], [5, 20, 5, 10], 0.3) == choose_heldout([1, 2, 3], [10, 20, 10], 0.3)


def test_keys_depend_on_text_and_seed() -> None:
    assert document_key(b"a", 0) == document_key(b"a", 0)
    assert len({document_key(text, seed) for text in (b"a", b"b") for seed in (0, 1)}) == 4


@pytest.mark.parametrize(("keys", "found"), [([], 0), ([7], 1), ([7, 7], 1)])
def test_too_few_documents(keys: list[int], found: int) -> None:
    with pytest.raises(UserError, match=f"the sources hold {found} distinct document.*needs at least two: add"):
        choose_heldout(keys, [1] * len(keys), 0.5)
