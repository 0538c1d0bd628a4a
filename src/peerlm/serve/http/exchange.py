"""From a request's events to its answer: whole or in chunks, from the same pieces."""

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from fastapi import Response

from peerlm.serve.http.answers import EventStream, as_json, experts_of, new_id, now, usage_of
from peerlm.serve.http.bodies import Sampled
from peerlm.serve.http.generation import Generation, unless_left
from peerlm.serve.request import Event


@dataclass
class Piece:
    """A part of a choice."""

    text: str = ""
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    """Lists with an element for each token."""
    experts: list[list[dict[str, Any]]] = field(default_factory=list)
    """For each token, its experts by layer."""
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.experts or self.finish)


def whole(pieces: Iterable[Piece]) -> Piece:
    """Pieces of one choice, one after the other."""
    found = Piece()
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        found.experts += piece.experts
        found.finish = piece.finish or found.finish
        for name, values in piece.logprobs.items():
            found.logprobs.setdefault(name, []).extend(values)
    found.text = "".join(texts)
    return found


class Style(Protocol):
    """How a kind of answer looks.

    Attributes:
        prefix: of its id.
        kind: its `object`.
        chunk_kind: the `object` of its chunks.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def opening(self, number: int) -> list[Mapping[str, Any]]:
        """Choices of chunks before the first event of a choice."""

    def piece(self, number: int, event: Event) -> Piece:
        """What an event adds to its choice, but for its experts and its end."""

    def in_chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """A piece as the choice of a chunk."""

    def in_whole(self, number: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""


async def answer(request: HttpRequest, body: Sampled, style: Style, generation: Generation) -> Response:
    """The answer to a request, once its sequences are submitted."""
    details = request.scope.setdefault("state", {}).setdefault("details", {})
    details |= {"model": body.model, "generation": generation}
    if request.app.state.served.settings.log_prompts:
        generation.keep_texts()
        details["asked"] = body.model_dump(include={"prompt", "messages"}, exclude_none=True)
    head = {"id": new_id(style.prefix), "created": now(), "model": body.model}
    if body.stream:
        return EventStream(generation, _chunks(head, body, style, generation))
    content = await unless_left(request, generation, _whole(head, style, generation))
    return Response(as_json(content), media_type="application/json")


async def _pieces(style: Style, generation: Generation) -> AsyncIterator[tuple[int, Piece]]:
    async for number, event in generation.events():
        piece = style.piece(number, event)
        piece.experts = experts_of(event)
        piece.finish = event.finish_reason
        generation.keep(number, piece.text)
        yield number, piece


async def _whole(head: Mapping[str, Any], style: Style, generation: Generation) -> dict[str, Any]:
    choices: list[list[Piece]] = [[] for _ in generation.handles]
    async for number, piece in _pieces(style, generation):
        choices[number].append(piece)
    made = []
    for number, pieces in enumerate(choices):
        piece = whole(pieces)
        made.append(_with_experts(style.in_whole(number, piece), piece))
    return {**head, "object": style.kind, "choices": made, "usage": usage_of(generation)}


async def _chunks(
    head: Mapping[str, Any], body: Sampled, style: Style, generation: Generation
) -> AsyncIterator[Mapping[str, Any]]:
    options = body.stream_options
    final = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    head = {**head, "object": style.chunk_kind}

    def chunk(choice: Mapping[str, Any]) -> Mapping[str, Any]:
        if always:
            return {**head, "choices": [choice], "usage": usage_of(generation)}
        return {**head, "choices": [choice], **({"usage": None} if final else {})}

    for number in range(len(generation.handles)):
        for opening in style.opening(number):
            yield chunk(opening)
    async for number, piece in _pieces(style, generation):
        if piece:
            yield chunk(_with_experts(style.in_chunk(number, piece), piece))
    if final:
        yield {**head, "choices": [], "usage": usage_of(generation)}


def _with_experts(choice: dict[str, Any], piece: Piece) -> dict[str, Any]:
    return {**choice, "experts": piece.experts} if piece.experts else choice
