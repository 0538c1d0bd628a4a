"""Tokens are drawn from the distribution that the parameters describe, each row for itself."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peerlm.errors import UserError
from peerlm.serve import SamplingParams
from peerlm.serve.sampling import Chosen, Sampler, choose

LOGITS = torch.tensor([2.0, 1.9, 0.3, -1.0, 2.4, -3.0, 0.0, 1.0])


def sampler(prompt: tuple[int, ...] = (), ends: frozenset[int] = frozenset(), **settings: Any) -> Sampler:
    return Sampler(SamplingParams(**{"max_tokens": 100} | settings), prompt, ends, len(LOGITS))


def drawn(logits: Tensor, one: Sampler) -> int:
    (found,) = choose(logits[None], [one])
    assert isinstance(found, Chosen)
    return found.token_id


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.2},
    ],
)
def test_shares_of_tokens_are_those_of_transformers_distribution(settings: dict[str, Any]) -> None:
    scores = TemperatureLogitsWarper(settings.get("temperature", 1.0))(torch.empty(0), LOGITS[None].clone())
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(torch.empty(0), scores)
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(torch.empty(0), scores)
    if "min_p" in settings:
        scores = MinPLogitsWarper(settings["min_p"])(torch.empty(0), scores)
    expected = scores[0].softmax(dim=0)
    one, draws = sampler(seed=1, **settings), 2000
    counts = torch.bincount(torch.tensor([drawn(LOGITS, one) for _ in range(draws)]), minlength=8)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4.5 * deviation).all()  # beyond by chance once in 20,000 times


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}, {"top_k": 3}])
def test_candidates_sorted_in_parts_give_the_same_tokens(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens() -> list[int]:
        one = sampler(seed=3, **settings)
        return [drawn(LOGITS, one) for _ in range(200)]

    whole = tokens()
    for few in (1, 2, 4):
        monkeypatch.setattr("peerlm.serve.sampling.FIRST_CANDIDATES", few)
        assert tokens() == whole


def test_repetition_is_penalised_as_by_transformers() -> None:
    one = sampler(prompt=(0, 3), repetition_penalty=1.7)
    one.written[5] += 2
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3, 5, 5]]), LOGITS[None].clone())[0]
    assert torch.equal(one.changed(LOGITS), expected)


def test_presence_and_frequency_count_the_text_alone_and_biases_add() -> None:
    one = sampler(prompt=(0,), presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 3.0})
    one.written[4] += 3
    changed = one.changed(LOGITS) - LOGITS
    assert changed.tolist() == pytest.approx([0, 0, 0, 0, -1.25, 0, 0, 3.0], abs=1e-6)


def test_ends_are_forbidden_until_enough_is_written() -> None:
    one = sampler(ends=frozenset({0, 4}), min_tokens=2, temperature=0)
    assert [drawn(LOGITS, one) for _ in range(3)] == [1, 1, 4]


def test_rows_do_not_change_each_other() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), torch.full_like(LOGITS, torch.nan), LOGITS])

    def rows() -> list[Sampler]:
        return [sampler(seed=1), sampler(temperature=0, logprobs=2), sampler(seed=1), sampler(seed=2, top_k=2)]

    together, alone = choose(logits, rows()), [choose(logits[row : row + 1], [rows()[row]])[0] for row in range(4)]
    assert together[:2] + together[3:] == alone[:2] + alone[3:]
    assert isinstance(together[2], UserError)


def test_very_low_temperatures_and_infinite_logits_are_fine() -> None:
    logits = LOGITS.clone()
    logits[3] = -torch.inf
    assert drawn(logits, sampler(temperature=5e-324)) == 4
    assert drawn(logits, sampler(logit_bias={4: 100.0}, seed=1)) == 4


def test_a_row_whose_tokens_are_all_forbidden_says_so() -> None:
    logits = torch.full((8,), -torch.inf)
    logits[2] = 1.0
    (found,) = choose(logits[None], [sampler(ends=frozenset({2}), min_tokens=1)])
    assert isinstance(found, UserError)
    assert "min_tokens and logit_bias forbid every token" in str(found)
