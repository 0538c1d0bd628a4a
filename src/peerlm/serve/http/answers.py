"""Answers as OpenAI's clients read them: whole, and in chunks."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pydantic_core
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from peerlm.serve.http.generation import Generation
from peerlm.serve.http.problems import Problem
from peerlm.serve.http.texts import Texts
from peerlm.serve.request import Event, TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not, as OpenAI says."""
_DONE = b"data: [DONE]\n\n"


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage_of(generation: Generation) -> CompletionUsage:
    """Tokens of a request until now."""
    usage = generation.usage
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def experts_of(event: Event) -> list[list[dict[str, Any]]]:
    """The experts of an event's token by layer, within a list that is empty where it has none."""
    if event.experts is None or event.token_id is None:
        return []
    return [
        [
            {"layer": path, "ids": [expert for expert, _ in used], "weights": [weight for _, weight in used]}
            for path, used in event.experts.items()
        ]
    ]


def finite(logprob: float) -> float:
    """A log-probability that JSON can write."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def by_text(texts: Texts, entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that was taken, by their texts; a second one of the same text has its id."""
    found: dict[str, float] = {}
    seen: set[int] = set()
    for token, logprob in ((entry.token_id, entry.logprob), *entry.top):
        if token in seen:
            continue
        seen.add(token)
        text = texts.token(token)[0]
        found[f"token_id:{token}" if text in found else text] = finite(logprob)
    return found


def as_json(value: Mapping[str, Any]) -> bytes:
    """JSON of plain values and of pydantic's models."""
    return pydantic_core.to_json(value, exclude_none=False, inf_nan_mode="constants")


class EventStream(StreamingResponse):
    """Server-sent events; whenever it ends, its sequences do."""

    def __init__(self, generation: Generation, chunks: AsyncIterator[Mapping[str, Any]]) -> None:
        super().__init__(self._lines(chunks), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.cancel()

    @staticmethod
    async def _lines(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + as_json(chunk) + b"\n\n"
        except Problem as problem:
            yield b"data: " + as_json(problem.body.model_dump()) + b"\n\n"
        yield _DONE
