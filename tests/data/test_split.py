"""The held-out split: the share of bytes is near what was asked for, copies stay together, a single document is cut."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlm.data import split
from peerlm.data.split import choose_heldout, copy_key, cut_tail, document_key
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


def test_copies_are_taken_by_the_least_of_their_order() -> None:
    keys, sizes, order = [8, 9, 8, 7], [5, 10, 5, 10], [30, 20, 10, 25]
    assert choose_heldout(keys, sizes, 0.5, order=order) == {7}  # after 8, whose order is 10, and 9
    assert choose_heldout(keys, sizes, 0.5) == {9}  # after 7 and 8


@pytest.mark.parametrize(
    "copy",
    [
        "\ufeffNaïve  text.\n\nMore of it.",
        "Naïve text.\r\n\r\nMore of it.",
        "Naïve text.\tMore\u00a0of it. \n",
        " Naïve text. More of\u2028it.",
        unicodedata.normalize("NFD", "Naïve text. More of it."),
    ],
)
def test_copies_have_one_key(copy: str) -> None:
    text = "Naïve text. More of it."
    assert copy != text
    assert copy_key(copy, 3) == copy_key(text, 3)


def test_texts_of_other_words_have_other_keys() -> None:
    texts = ["a b", "ab", "a B", "b a", "a b.", "a b b"]
    assert len({copy_key(text, seed) for text in texts for seed in (0, 1)}) == 2 * len(texts)


@given(st.text(st.sampled_from(" \n\u3000ab\ufeffe\u0301"), max_size=12), st.integers(1, 4))
def test_a_key_does_not_depend_on_how_a_text_is_read(text: str, part: int) -> None:
    normal = " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_PART", part)
        assert copy_key(text, 5) == document_key(normal.encode(), 5)


def lines(count: int) -> list[str]:
    return [f"This is line {number} of the text." for number in range(count)]


@pytest.mark.parametrize(("between", "count"), [("\n\n", 3000), ("\r\n", 3000), ("\n \n", 40)])
def test_a_single_document_is_cut_at_a_boundary(between: str, count: int) -> None:
    parts = lines(count)
    head, tail = cut_tail(between.join(parts) + "\n", 0.02)
    held = tail.count("line")
    assert head == between.join(parts[: count - held])
    assert tail == between.join(parts[count - held :])


@pytest.mark.parametrize(
    ("characters", "holdout", "share"), [(10**6, 0.05, 0.05), (40_000, 0.02, 0.1024), (2000, 0.02, 0.2)]
)
def test_the_end_of_a_short_text_is_longer(characters: int, holdout: float, share: float) -> None:
    text = "\n".join(lines(characters // 20))[:characters]
    head, tail = cut_tail(text, holdout)
    assert len(tail) / len(text) == pytest.approx(share, abs=40 / characters)
    assert len(head) + len(tail) + 1 == len(text)


def test_paragraphs_come_before_lines_and_lines_before_words() -> None:
    text = "\n".join(lines(1000))
    target = len(text) - 4096
    place = text.index("\n", target + 1000)
    assert cut_tail(f"{text[:place]}\n{text[place:]}", 0.01)[1] == text[place + 1 :]
    words = text.replace("\n", " ")
    head, tail = cut_tail(words, 0.01)
    assert f"{head} {tail}" == words
    assert cut_tail("字" * 1000, 0.01)[1] == "字" * 200


def test_a_single_document_that_is_too_short_is_not_cut() -> None:
    with pytest.raises(
        UserError, match=r"hold 1 distinct document of 399 characters, too short .*: add text, 400 char"
    ):
        cut_tail("word " * 80, 0.02)
    with pytest.raises(UserError, match=r"whose end is a copy of the rest: lower holdout from 0\.5"):
        cut_tail("\n".join(["a" * 300] * 2), 0.5)
