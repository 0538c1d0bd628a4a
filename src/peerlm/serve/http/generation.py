"""One HTTP request's sequences: submitted together, read as they come, cancelled together."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from peerlm.serve.handle import Handle
from peerlm.serve.http.bodies import Sampled
from peerlm.serve.http.problems import NOT_AGAIN, Problem
from peerlm.serve.http.served import ServedModel
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.protocol import QueueFull
from peerlm.serve.request import Event, Request, SamplingParams

T = TypeVar("T")
RETRY_SECONDS = 1
"""After which a client that was turned away should come again."""
_AS_THEY_ARE = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "seed",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    """The sequences of one request, and what has come of them.

    Args:
        handles: one for each choice, in order.
        prompt_tokens: of all prompts, each once.
        choices: how many of the handles each prompt has.
    """

    def __init__(self, handles: Sequence[Handle], prompt_tokens: int, choices: int) -> None:
        self.handles = list(handles)
        self._choices = choices
        self.started = time.monotonic()
        self.first_seconds: float | None = None
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finishes: list[str] = []
        self.texts: list[str] | None = None

    @property
    def usage(self) -> Usage:
        """Tokens until now."""
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def keep_texts(self) -> None:
        """Collect what is written, for a log."""
        self.texts = [""] * len(self.handles)

    def keep(self, number: int, text: str) -> None:
        """Add to the text of a choice, where texts are collected."""
        if self.texts is not None:
            self.texts[number] += text

    def cancel(self) -> None:
        """End all sequences."""
        for handle in self.handles:
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The number of a choice and its next event, in the order in which they come.

        Raises:
            Problem: a sequence did not end by itself.
        """
        merged = self._one() if len(self.handles) == 1 else self._many()
        async for number, event in merged:
            if self.first_seconds is None:
                self.first_seconds = time.monotonic() - self.started
            self.completion_tokens += event.token_id is not None
            if number % self._choices == 0:  # the prompt of the others is the same, and counts once
                self.cached_tokens += event.cached_tokens or 0
            if event.finish_reason is not None:
                self.finishes.append(event.finish_reason)
                check_end(event)
            yield number, event

    async def _one(self) -> AsyncIterator[tuple[int, Event]]:
        async for event in self.handles[0]:
            yield 0, event

    async def _many(self) -> AsyncIterator[tuple[int, Event]]:
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        async def forward(number: int, handle: Handle) -> None:
            async for event in handle:
                queue.put_nowait((number, event))

        tasks = [asyncio.create_task(forward(number, handle)) for number, handle in enumerate(self.handles)]
        running = len(tasks)
        try:
            while running:
                number, event = await queue.get()
                running -= event.finish_reason is not None
                yield number, event
        finally:
            for task in tasks:
                task.cancel()


def check_end(event: Event) -> None:
    """Raise a Problem where a sequence ended for another reason than its own text."""
    if event.finish_reason == "timeout":
        message = "the request took longer than this server allows; ask for fewer tokens"
        raise Problem(504, message, code="deadline", headers=NOT_AGAIN)
    if event.finish_reason == "cancelled":
        raise Problem(503, "the server stops, and ended this request", code="stopping")
    if event.finish_reason == "error":
        raise Problem(500, event.error or "the engine failed", code="engine_error", headers=NOT_AGAIN)


def sampling_of(
    body: Sampled, settings: HttpSettings, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """What a body says of sampling.

    Raises:
        Problem: a value is out of range, 400.
    """
    if settings.max_new_tokens is not None and max_tokens > settings.max_new_tokens:
        raise Problem(
            400,
            f"max_tokens is {max_tokens:,}; this server writes at most {settings.max_new_tokens:,}",
            param="max_tokens",
        )
    given: dict[str, Any] = {name: value for name in _AS_THEY_ARE if (value := getattr(body, name)) is not None}
    given["top_k"] = 0 if body.top_k in (None, -1) else body.top_k
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )
    except ValueError as error:
        raise _refused(body, error) from error


def _refused(body: Sampled, error: ValueError) -> Problem:
    """What an engine refuses; its message begins with the field that is wrong, or is about the prompt."""
    fields = type(body).model_fields
    word = str(error).partition(" ")[0]
    return Problem(400, str(error), param=word if word in fields else "prompt" if "prompt" in fields else "messages")


def submit(
    served: ServedModel, body: Sampled, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> Generation:
    """Queue each prompt as often as there are choices; all or none.

    Raises:
        Problem: the queue is full, 429; a prompt cannot be read, or there are too many, 400; the model's packs have
            been unloaded meanwhile, 404; the server stops, 503.
    """
    choices, most = body.choices, served.settings.max_sequences
    if len(prompts) * choices > most:
        raise Problem(
            400, f"{len(prompts):,} prompts times n = {choices} is more than the {most:,} texts of a request", param="n"
        )
    packs = served.packs(body.model)
    deadline = time.monotonic() + served.settings.deadline_seconds
    handles: list[Handle] = []
    try:
        for prompt in prompts:
            for choice in range(choices):
                seed = None if sampling.seed is None else _seed(sampling.seed + choice)
                own = sampling if choice == 0 else replace(sampling, seed=seed)
                request = Request(
                    prompt=tuple(prompt), sampling=own, packs=packs, deadline=deadline, trace=bool(body.experts)
                )
                handles.append(served.engine.submit(request))
    except QueueFull as error:
        _cancel(handles)
        served.packs(body.model)  # it may stop since
        raise Problem(429, str(error), code="queue_full", headers={"retry-after": str(RETRY_SECONDS)}) from error
    except ValueError as error:
        _cancel(handles)
        served.packs(body.model)  # a pack may be gone since
        raise _refused(body, error) from error
    except BaseException:
        _cancel(handles)
        raise
    return Generation(handles, sum(map(len, prompts)), choices)


def _seed(seed: int) -> int:
    """A seed within the range of the engine's."""
    return (seed + 2**63) % 2**64 - 2**63


def _cancel(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.cancel()


async def unless_left(request: HttpRequest, generation: Generation, work: Awaitable[T]) -> T:
    """The result of work, which ends with its sequences when the client leaves.

    Raises:
        Problem: the client has left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "the client has left", code="client_left")
        return task.result()
    finally:
        generation.cancel()
        for other in (task, watch):
            other.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await other


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
