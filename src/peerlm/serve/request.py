"""What a client asks of a serving engine, and what it gets back token by token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_LOGPROBS = 20
"""Most alternatives per token whose log-probabilities can be asked for."""
MAX_STOPS = 64
"""Most stop strings, and most stop tokens, of a request."""
FINISHES = ("stop", "length", "cancelled", "timeout", "error")
"""Why a request has ended."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. A value out of range raises ValueError, with the field and the value.

    Penalties and biases change the logits first, then the temperature, top_k, top_p and min_p, in this order.
    Log-probabilities are those of the model, before any of these.
    """

    max_tokens: int = 16
    """Tokens to write at the most; 0 reads the prompt alone."""
    min_tokens: int = 0
    """Tokens to write before anything but max_tokens may end the text."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, and nothing is drawn."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together are at least this probable, within (0, 1]."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Draw from tokens at least this probable, as a share of the likeliest one's probability, within [0, 1]."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the text; they are no part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the model's own."""
    ignore_eos: bool = False
    """Whether the model's own end-of-text tokens end nothing."""
    logprobs: int | None = None
    """Number of likeliest alternatives that each written token is reported with, 0 to 20; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, -100 to 100."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt and the text, and multiplies negative ones; above 0."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the text, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the text once for each time, -2 to 2."""

    def __post_init__(self) -> None:
        """Raise ValueError where a field is out of range."""
        _whole(self, "max_tokens", 0)
        _whole(self, "min_tokens", 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}")
        _number(self, "temperature", 0, math.inf)
        _number(self, "top_p", 0, 1, above=True)
        _whole(self, "top_k", 0)
        _number(self, "min_p", 0, 1)
        if self.seed is not None:
            _whole(self, "seed", -(2**63), 2**64 - 1)
        if not _all(self.stop, str) or not all(self.stop) or len(self.stop) > MAX_STOPS:
            raise ValueError(
                f"stop is {self.stop!r}; it must be a tuple of at most {MAX_STOPS} texts, none of them empty"
            )
        if not _all(self.stop_token_ids, int) or len(self.stop_token_ids) > MAX_STOPS:
            raise ValueError(
                f"stop_token_ids is {self.stop_token_ids!r}; it must be a tuple of at most {MAX_STOPS} token ids"
            )
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(self, name, 0, MAX_LOGPROBS)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or not _is_number(bias) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {bias!r}; it must map token ids to numbers from -100 to 100"
                )
        _number(self, "repetition_penalty", 0, math.inf, above=True)
        _number(self, "presence_penalty", -2, 2)
        _number(self, "frequency_penalty", -2, 2)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to be written. A value of a wrong kind raises ValueError, with the field and the value."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    packs: tuple[str, ...] = ()
    """Names of loaded packs and adapters to use, several at once; none leaves the model as it is."""
    deadline: float | None = None
    """Of `time.monotonic()`, in seconds; past it the request ends with "timeout"."""
    trace: bool = False
    """Whether each event says which experts were used."""

    def __post_init__(self) -> None:
        """Raise ValueError where a field is of a wrong kind."""
        if not _all(self.prompt, int) or not self.prompt:
            raise ValueError("prompt must be a tuple of at least one token id")
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling is {self.sampling!r}; it must be SamplingParams")
        if not _all(self.packs, str) or len(set(self.packs)) < len(self.packs):
            raise ValueError(f"packs is {self.packs!r}; it must be a tuple of names, each once")
        if self.deadline is not None and not _is_number(self.deadline):
            raise ValueError(f"deadline is {self.deadline!r}; it must be a number of seconds")


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a token where it stands, and those of the likeliest tokens there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Token ids and log-probabilities of as many as were asked for, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a request: one event for each token written, in order, and one that ends it.

    The last event, and no other, has a finish reason. It may have a token too. The texts of all events, joined, are the
    text. A token's text may come later, with those after it: characters are whole, and what might begin a stop string
    is kept back.
    """

    token_id: int | None = None
    text: str = ""
    logprobs: TokenLogprob | None = None
    """Of the token, where `sampling.logprobs` asks for it."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """In the first event, where `sampling.prompt_logprobs` asks for them: one for each token of the prompt, None for
    the first, before which nothing stands."""
    experts: Mapping[str, tuple[tuple[int, float], ...]] | None = None
    """Where the request is traced, by the path of each layer: the experts used to predict this token and their weights,
    summed over heads, the largest magnitude first. Ids from the layer's own number on are those of its packs."""
    finish_reason: str | None = None
    """None, or one of `FINISHES`: "stop" for a stop string or token, "length" for max_tokens or the context's end."""
    stop: int | str | None = None
    """The stop token or stop string that ended the text; the token has an event, its text is not shown."""
    error: str | None = None
    """One sentence, where finish_reason is "error"."""
    cached_tokens: int | None = None
    """In the first event: how many tokens of the prompt were not read again, as an earlier request had read them."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(values: Any, kind: type) -> bool:
    """Whether it is a tuple of values of a kind."""
    if kind is int:
        return isinstance(values, tuple) and all(map(_is_int, values))
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


def _whole(params: SamplingParams, name: str, least: int, most: int | None = None) -> None:
    value = getattr(params, name)
    if not _is_int(value) or value < least or (most is not None and value > most):
        range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number {range_}")


def _number(params: SamplingParams, name: str, least: float, most: float, *, above: bool = False) -> None:
    value = getattr(params, name)
    if not _is_number(value) or not least <= value <= most or (above and value == least):
        low = f"above {least}" if above else f"of at least {least}"
        high = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} is {value!r}; it must be a number {low}{high}")
