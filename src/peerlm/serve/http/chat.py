"""/v1/chat/completions: the next message of a chat, by the tokenizer's template."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from openai.types.chat import ChatCompletion

from peerlm.serve.http.answers import finite
from peerlm.serve.http.bodies import ChatBody
from peerlm.serve.http.exchange import Piece, answer
from peerlm.serve.http.generation import sampling_of, submit
from peerlm.serve.http.problems import Problem, documented
from peerlm.serve.http.served import Served
from peerlm.serve.http.strict import StrictRoute
from peerlm.serve.http.texts import Texts
from peerlm.serve.request import Event

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


class ChatStyle:
    """Choices with a message of the assistant's.

    Args:
        texts: the tokenizer.
    """

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def opening(self, number: int) -> list[Mapping[str, Any]]:
        """Who speaks."""
        return [self._choice(number, {"role": "assistant", "content": ""}, Piece())]

    def piece(self, number: int, event: Event) -> Piece:
        """The text, and the log-probability of its token."""
        piece = Piece(text=event.text)
        if event.logprobs is not None:
            top = [self._token(token, logprob) for token, logprob in event.logprobs.top]
            entry = self._token(event.logprobs.token_id, event.logprobs.logprob)
            piece.logprobs = {"content": [{**entry, "top_logprobs": top}]}
        return piece

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self.texts.token(token)
        return {"token": text, "logprob": finite(logprob), "bytes": None if content is None else list(content)}

    @staticmethod
    def _choice(number: int, delta: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = {**piece.logprobs, "refusal": None} if piece.logprobs else None
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def in_chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """OpenAI's `Choice` of chunks."""
        return self._choice(number, {"content": piece.text} if piece.text or not piece.finish else {}, piece)

    def in_whole(self, number: int, piece: Piece) -> dict[str, Any]:
        """OpenAI's `Choice`."""
        choice = self._choice(number, {}, piece)
        del choice["delta"]
        return {**choice, "message": {"role": "assistant", "content": piece.text, "refusal": None}}


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion}, **documented(400, 401, 404, 408, 413, 429, 500, 503, 504)},
)
async def chat(body: ChatBody, request: Request, served: Served) -> Response:
    """Write the assistant's next message."""
    served.packs(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = await served.tokenized(served.texts.chat_ids, [message.for_template for message in body.messages])
    room = served.engine.context - len(prompt)
    most = served.settings.max_new_tokens
    sampling = sampling_of(
        body,
        served.settings,
        max_tokens=max(1, room if most is None else min(room, most)) if asked is None else asked,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
    )
    generation = submit(served, body, [prompt], sampling)
    return await answer(request, body, ChatStyle(served.texts), generation)
