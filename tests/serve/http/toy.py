"""A small engine behind the same protocol: it repeats the prompt's tokens, so that every answer is known."""

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from peerlm.serve import Event, Handle, Histogram, InUse, LayerUse, Loaded, QueueFull, Request, Stats, TokenLogprob

LOGPROB = -0.5


class ToyEngine:
    """Writes the prompt's tokens again and again, a token for each request in each step; packs write them reversed."""

    def __init__(self, tokenizer: Any, *, context: int = 64, queue: int = 32, pace: float = 0.0):
        self.tokenizer = tokenizer
        self.context = context
        self.vocab_size = len(tokenizer)
        self.queue = queue
        self.pace = pace
        self.requests: list[Request] = []
        self.finished: Counter[str] = Counter()
        self.fail = ""
        self._packs: dict[str, Loaded] = {}
        self._running: list[tuple[Request, Handle, list[int]]] = []
        self._changed = threading.Condition()
        self._stop = False
        self._draining = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        with self._changed:
            if self._draining or len(self._running) >= self.queue:
                raise QueueFull(f"{self.queue} requests wait; come again later")
            if len(request.prompt) >= self.context:
                raise ValueError(f"the prompt has {len(request.prompt)} tokens; the context has {self.context}")
            sampling = request.sampling
            for name in ("prompt", "logit_bias", "stop_token_ids"):
                for token in request.prompt if name == "prompt" else getattr(sampling, name):
                    if token >= self.vocab_size:
                        raise ValueError(f"{name} has {token}; there is no token {token}")
            for name in request.packs:
                if name not in self._packs:
                    raise ValueError(f"no pack {name}")
                self._packs[name] = replace(self._packs[name], running=self._packs[name].running + 1)
            handle = Handle(self._wake)
            self.requests.append(request)
            self._running.append((request, handle, []))
            self._changed.notify_all()
            return handle

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._running and not self._stop:
                    self._changed.wait()
                if self._stop:
                    return
                for entry in list(self._running):
                    if self._step(*entry):
                        self._running.remove(entry)
                        for name in entry[0].packs:
                            self._packs[name] = replace(self._packs[name], running=self._packs[name].running - 1)
                self._changed.notify_all()
            time.sleep(self.pace)

    def _step(self, request: Request, handle: Handle, written: list[int]) -> bool:
        sampling, prompt = request.sampling, request.prompt
        if handle.cancelled or self.fail or (request.deadline is not None and time.monotonic() > request.deadline):
            reason = "cancelled" if handle.cancelled else "error" if self.fail else "timeout"
            return self._end(handle, Event(finish_reason=reason, error=self.fail or None))
        order = prompt[::-1] if request.packs else prompt
        token = order[len(written) % len(order)]
        first: dict[str, Any] = {}
        if not written:
            first["cached_tokens"] = len(prompt) - 1
            if sampling.prompt_logprobs is not None:
                first["prompt_logprobs"] = (None, *(self._entry(t, sampling.prompt_logprobs) for t in prompt[1:]))
        if sampling.max_tokens == 0:
            return self._end(handle, Event(finish_reason="length", **first))
        written.append(token)
        text = self.tokenizer.decode([token])
        logprobs = None if sampling.logprobs is None else self._entry(token, sampling.logprobs)
        experts = {"model.layers.1.ffw": ((token, 0.75), (1, 0.25))} if request.trace else None
        stop = next((stop for stop in sampling.stop if stop in text), None)
        last = len(written) == sampling.max_tokens or len(prompt) + len(written) == self.context
        reason = "stop" if stop else "length" if last else None
        event = Event(
            token_id=token,
            text="" if stop else text,
            logprobs=logprobs,
            experts=experts,
            finish_reason=reason,
            stop=stop,
            **first,
        )
        if reason:
            return self._end(handle, event)
        handle.put(event)
        return False

    def _end(self, handle: Handle, event: Event) -> bool:
        self.finished[event.finish_reason] += 1
        handle.put(event)
        return True

    def _entry(self, token: int, top: int) -> TokenLogprob:
        best = tuple(((token + i) % self.vocab_size, LOGPROB - i) for i in range(top))
        return TokenLogprob(token, LOGPROB, best)

    def load(self, name: str, folder: str | Path) -> Loaded:
        if name in self._packs or not name.isidentifier():
            raise ValueError(f"the name {name!r} is taken or unusual")
        if not (Path(folder) / "manifest.json").is_file():
            raise ValueError(f"{folder} has no pack")
        self._packs[name] = Loaded(name, Path(folder), "pack", 0)
        return self._packs[name]

    def unload(self, name: str, timeout: float = 60.0) -> None:
        if self._packs[name].running:
            raise InUse(f"{name} is used by {self._packs[name].running} requests")
        del self._packs[name]

    def loaded(self) -> dict[str, Loaded]:
        return dict(self._packs)

    def stats(self) -> Stats:
        seconds = Histogram((0.1, 1.0), (2, 1, 0), 0.4)
        return Stats(
            waiting=0,
            running=len(self._running),
            slots=8,
            cache_bytes=1,
            cache_bytes_limit=2,
            prompt_tokens=3,
            cached_tokens=0,
            generated_tokens=4,
            tokens_per_second=5.0,
            finished=dict(self.finished),
            first_token_seconds=seconds,
            token_seconds=seconds,
            steps=6,
            use={"model.layers.1.ffw": LayerUse(64, 0.5, 0.25)},
        )

    def drain(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._running, timeout)

    def close(self) -> None:
        with self._changed:
            self._stop = True
            for _, handle, _ in self._running:
                handle.put(Event(finish_reason="cancelled"))
            self._running.clear()
            self._changed.notify_all()
        self._thread.join()
