"""One request on its way through an engine: what was written, and why it ends."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peerlm.errors import UserError, shortened
from peerlm.serve.additions import Choice
from peerlm.serve.handle import Handle
from peerlm.serve.measures import Measures
from peerlm.serve.request import Event, Request, SamplingParams, TokenLogprob
from peerlm.serve.sampling import Chosen, Sampler
from peerlm.serve.text import TextStream, special_tokens

Experts = Mapping[str, tuple[tuple[int, float], ...]]


class Running:
    """State of a request that waits or runs, of the engine's thread.

    Args:
        request, handle: of `Engine.submit`.
        measures: where it counts.
    """

    def __init__(self, request: Request, handle: Handle, measures: Measures):
        self.request, self.handle = request, handle
        self.submitted = time.monotonic()
        self.choice = Choice()
        self.tokens = list(request.prompt)
        self.begun = self.ended = False
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self._measures = measures
        self._last_event: float | None = None
        self._ends: frozenset[int] = frozenset()
        """Tokens that end the text: the model's own, and those that the request names."""
        self._sampler: Sampler | None = None
        self._text: TextStream | None = None

    def begin(self, tokenizer: Any, ends: frozenset[int], vocab_size: int) -> None:
        """Prepare to write; what an earlier attempt has left is forgotten."""
        self.prompt_logprobs = [None]
        self.begun = True
        request = self.request
        own = frozenset() if request.sampling.ignore_eos else ends
        self._ends = own | _stop_tokens(tokenizer, request.sampling)
        self._sampler = Sampler(request.sampling, request.prompt, self._ends, vocab_size)
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop)

    @property
    def sampler(self) -> Sampler:
        """Of this sequence."""
        assert self._sampler is not None
        return self._sampler

    def overdue(self) -> str | None:
        """Why it must end now: "cancelled", "timeout", or None."""
        if self.handle.cancelled:
            return "cancelled"
        if self.request.deadline is not None and time.monotonic() >= self.request.deadline:
            return "timeout"
        return None

    def write(self, chosen: Chosen, context: int, experts: Experts | None) -> None:
        """Take a token, tell the reader, and end where that was the last one."""
        assert self._text is not None
        sampling, token = self.request.sampling, chosen.token_id
        self.tokens.append(token)
        written = len(self.tokens) - len(self.request.prompt)
        may_stop = written >= sampling.min_tokens
        text = ""
        stop: int | str | None = None
        reason: str | None = None
        if may_stop and token in self._ends:
            stop, reason = token, "stop"
            text, _ = self._text.finish(may_stop=False)
        else:
            text, found = self._text.add(token, may_stop=may_stop)
            full = written >= sampling.max_tokens or len(self.tokens) >= context
            if found is None and full:
                rest, found = self._text.finish(may_stop=may_stop)
                text += rest
            if found is not None:
                stop, reason = found, "stop"
            elif full:
                reason = "length"
        self._tell(
            Event(token_id=token, text=text, logprobs=chosen.logprob, experts=experts, finish_reason=reason, stop=stop)
        )

    def end(self, reason: str, error: str | None = None) -> None:
        """End without a token; nothing happens where it has ended."""
        if not self.ended:
            text = "" if self._text is None or error is not None else self._text.finish(may_stop=False)[0]
            self._tell(Event(text=text, finish_reason=reason, error=error))

    def fail(self, error: BaseException) -> None:
        """End with an error, which says what an exception does."""
        text = shortened(" ".join(str(error).split()), 300)
        self.end(
            "error", text if isinstance(error, UserError) else f"the model failed with {type(error).__name__}: {text}"
        )

    def _tell(self, event: Event) -> None:
        now = time.monotonic()
        first = self._last_event is None
        failed = event.finish_reason in ("cancelled", "timeout", "error")
        if first and not failed:
            wants = self.request.sampling.prompt_logprobs is not None
            logprobs = tuple(self.prompt_logprobs) if wants else None
            event = replace(event, prompt_logprobs=logprobs, cached_tokens=self.cached_tokens)
        if first and not failed:
            self._measures.first_token.add(now - self.submitted)
        elif not first and event.token_id is not None:
            assert self._last_event is not None
            self._measures.token.add(now - self._last_event)
        self._last_event = now
        if event.finish_reason is not None:
            self.ended = True
            self._measures.finished[event.finish_reason] += 1
        self.handle.put(event)


def _stop_tokens(tokenizer: Any, sampling: SamplingParams) -> frozenset[int]:
    """Tokens that a request wants to stop at; a special token may be one by its text, which no decoded text has."""
    special = special_tokens(tokenizer) if sampling.stop else {}
    return frozenset(sampling.stop_token_ids) | {special[stop] for stop in sampling.stop if stop in special}
