"""/v1/completions: texts continued, with the log-probabilities of prompt and text where asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from openai.types import Completion

from peerlm.serve.http.answers import by_text, finite
from peerlm.serve.http.bodies import CompletionBody
from peerlm.serve.http.exchange import Piece, answer
from peerlm.serve.http.generation import sampling_of, submit
from peerlm.serve.http.offsets import Offsets
from peerlm.serve.http.problems import Problem, documented
from peerlm.serve.http.served import Served
from peerlm.serve.http.strict import StrictRoute
from peerlm.serve.http.texts import Texts
from peerlm.serve.request import Event, TokenLogprob

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])
DEFAULT_MAX_TOKENS = 16
"""As of OpenAI."""


class CompletionStyle:
    """Choices with a text.

    Args:
        texts: the tokenizer.
        echoes: for each choice, the prompt's text and token ids where it begins the answer, else None.
    """

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, texts: Texts, echoes: Sequence[tuple[str, Sequence[int]] | None]) -> None:
        self.texts = texts
        self.echoes = list(echoes)
        self.offsets = [Offsets(texts) for _ in self.echoes]

    def opening(self, number: int) -> list[Mapping[str, Any]]:
        """Nothing: a text begins with its first token."""
        return []

    def piece(self, number: int, event: Event) -> Piece:
        """The text, and the log-probability of its token."""
        piece = Piece(text=event.text)
        echo, self.echoes[number] = self.echoes[number], None
        if echo is not None:
            piece.text = echo[0] + event.text
            for token, entry in zip(echo[1], event.prompt_logprobs or (), strict=False):
                self._add(piece, number, token, entry, within=echo[0])
        if event.logprobs is not None:
            self._add(piece, number, event.logprobs.token_id, event.logprobs)
        return piece

    def _add(
        self, piece: Piece, number: int, token: int, entry: TokenLogprob | None, *, within: str | None = None
    ) -> None:
        row = {
            "tokens": self.texts.token(token)[0],
            "token_logprobs": None if entry is None else finite(entry.logprob),
            "top_logprobs": None if entry is None else by_text(self.texts, entry),
            "text_offset": self.offsets[number].next(token, within),
        }
        for name, value in row.items():
            piece.logprobs.setdefault(name, []).append(value)

    def in_chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """As whole ones."""
        return self.in_whole(number, piece)

    def in_whole(self, number: int, piece: Piece) -> dict[str, Any]:
        """OpenAI's `CompletionChoice`."""
        return {
            "index": number,
            "text": piece.text,
            "logprobs": piece.logprobs or None,
            "finish_reason": piece.finish,
        }


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion}, **documented(400, 401, 404, 408, 413, 429, 500, 503, 504)},
)
async def complete(body: CompletionBody, request: Request, served: Served) -> Response:
    """Continue one text or several: a string, a list of strings, token ids, or a list of lists of token ids."""
    served.packs(body.model)
    if body.best_of is not None and body.best_of != body.choices:
        raise Problem(400, f"best_of is {body.best_of}; this server supports only best_of = n", param="best_of")
    if not body.prompts:
        raise Problem(400, "prompt is an empty list; give a text or token ids", param="prompt")
    if len(body.prompts) > served.settings.max_sequences:
        message = f"{len(body.prompts):,} prompts are more than the {served.settings.max_sequences:,} of a request"
        raise Problem(400, message, param="prompt")
    most = DEFAULT_MAX_TOKENS if served.settings.max_new_tokens is None else served.settings.max_new_tokens
    sampling = sampling_of(
        body,
        served.settings,
        max_tokens=min(DEFAULT_MAX_TOKENS, most) if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    prompts = await served.tokenized(_ids, served.texts, body)
    generation = submit(served, body, prompts, sampling)
    echoes = [
        (given if isinstance(given, str) else served.texts.text(ids), ids) if body.echo else None
        for given, ids in zip(body.prompts, prompts, strict=True)
        for _ in range(body.choices)
    ]
    return await answer(request, body, CompletionStyle(served.texts, echoes), generation)


def _ids(texts: Texts, body: CompletionBody) -> list[list[int]]:
    special = body.add_special_tokens is not False
    found = [texts.ids(given, special=special) if isinstance(given, str) else given for given in body.prompts]
    if not all(found):
        raise Problem(400, "a prompt has no token; give a text or token ids", param="prompt")
    return found
