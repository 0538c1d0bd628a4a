"""Requests and sampling parameters check themselves, and say which field is wrong."""

from typing import Any

import pytest

from peerlm.serve import Request, SamplingParams

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", True),
    ("min_tokens", 17),
    ("temperature", -1),
    ("temperature", float("nan")),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("min_p", 2),
    ("seed", 2**64),
    ("stop", "text"),
    ("stop", ("",)),
    ("stop_token_ids", (1.5,)),
    ("ignore_eos", 1),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("logit_bias", {1: 101}),
    ("logit_bias", {"1": 1}),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", "1"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_sampling_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} (is|has) "):
        SamplingParams(**{name: value})


def test_the_ends_of_ranges_are_taken() -> None:
    SamplingParams(max_tokens=0, temperature=0, top_p=1, min_p=1, seed=2**64 - 1, logprobs=20, logit_bias={0: -100})


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt", ()), ("prompt", (True,)), ("sampling", {}), ("packs", ("a", "a")), ("deadline", "soon")],
)
def test_a_wrong_field_of_a_request_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        Request(**({"prompt": (1,)} | {name: value}))
