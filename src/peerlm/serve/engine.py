"""The engine: one thread that runs a model for all requests at once, which join and leave its batch at any step.

In each round it reads some of a waiting prompt, then writes one token for each running request. A forward pass that
fails is repeated for each of its rows alone, so that a request ends with an error where it is at fault, and the others
do not notice.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from peerlm.errors import UserError, listed
from peerlm.serve.additions import Additions, Choice
from peerlm.serve.cache import SlotCache, cache_bytes, last_tokens
from peerlm.serve.forward import Forward
from peerlm.serve.handle import Handle
from peerlm.serve.measures import Measures
from peerlm.serve.prefill import Prefill
from peerlm.serve.prefixes import Prefixes
from peerlm.serve.protocol import InUse, Loaded, QueueFull, Stats
from peerlm.serve.request import Request
from peerlm.serve.sampling import Chosen, choose
from peerlm.serve.sequence import Running
from peerlm.serve.watch import Watch

DEFAULT_CONTEXT = 2048
"""Tokens of a sequence at the most, where the model reads more."""


class Engine:
    """Serves a causal model: `EngineProtocol` says how.

    Greedy text in float32 is that of `model.generate` with a fresh prompt, whatever else is in the batch. The thread
    begins at once; `close` ends it. While it lives, nobody else may run the model or change it.

    Args:
        model: of transformers or peerlm, in evaluation mode, where it is to run.
        tokenizer: its own.
        slots: most requests that run at once.
        context: most tokens of a sequence, prompt and text together; None for what the model reads, up to 2,048.
        queue: most requests that wait.
        chunk: tokens of prompts that are read between two steps of those that run, padding included.
        prefix_bytes: most bytes of caches that are kept of earlier requests, for those that begin alike; 0 for none.

    Attributes:
        description: one sentence on memory.

    Raises:
        UserError: the model's cache or its layers do not allow requests to join and leave.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        slots: int = 32,
        context: int | None = None,
        queue: int = 1024,
        chunk: int = 256,
        prefix_bytes: int = 2**28,
    ):
        reads = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
        context = min(reads, DEFAULT_CONTEXT) if context is None else context
        for name, value, least in (
            ("slots", slots, 1),
            ("context", context, 2),
            ("queue", queue, 1),
            ("chunk", chunk, 1),
            ("prefix_bytes", prefix_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if context > reads:
            raise ValueError(f"context is {context}; the model was made for {reads} tokens, so take at most that")
        self.tokenizer = tokenizer
        self.context = context
        self.slots = slots
        self._queue = queue
        self._forward = Forward(model)
        self.vocab_size = self._forward.vocab_size
        self._ends = _ends(model, tokenizer)
        self._additions = Additions(model, self._choices)
        self._folders: dict[str, tuple[str, Path]] = {
            name: (kind, Path()) for name, kind in self._additions.kinds.items()
        }
        self._leaving: set[str] = set()
        self._one_change = threading.Lock()
        """Of what is loaded: held while a thread reads the model to load, or takes something away."""
        self._cache = SlotCache(slots, context)
        self._prefixes = Prefixes(prefix_bytes, self._forward.bytes_per_token)
        per_token = self._forward.bytes_per_token
        self._cache_limit = (slots * self._cache.most_columns + context) * per_token + prefix_bytes
        self.description = (
            f"the cache takes at most {_size(self._cache_limit)}: {slots} slots of {context:,} tokens, "
            f"{_size(per_token)} each, a prompt that is read, and {_size(prefix_bytes)} of earlier requests"
        )
        self._watch = Watch(model)
        self._measures = Measures()
        self._changed = threading.Condition()
        self._running: list[Running] = []
        self._prefill = Prefill(
            self._forward,
            self._watch,
            self._additions,
            self._prefixes,
            self._running,
            chunk=chunk,
            slots=slots,
            changed=self._changed,
            begin=self._begin,
            start=self._start,
        )
        self._tasks: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._serve, name="peerlm engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """As `EngineProtocol.submit`."""
        self._check(request)
        handle = Handle(self._wake)
        entry = Running(request, handle, self._measures)
        with self._changed:
            for name in request.packs:
                if name not in self._folders or name in self._leaving:
                    raise UserError(f"no pack or adapter {name!r} is loaded; there is {listed(self._available())}")
            if self._draining or self._closing:
                raise QueueFull("the server takes no further requests, as it stops")
            if len(self._prefill.waiting) >= self._queue:
                raise QueueFull(
                    f"{len(self._prefill.waiting)} requests wait already, which is the most; try again later"
                )
            self._prefill.waiting.append(entry)
            self._changed.notify_all()
        return handle

    def load(self, name: str, folder: str | Path) -> Loaded:
        """As `EngineProtocol.load`."""
        folder = Path(folder)
        with self._one_change:
            with self._changed:
                self._check_free(name)
            kind, put = self._additions.read(name, folder)

            def add() -> None:
                put()
                with self._changed:
                    self._folders[name] = (kind, folder)

            self._between_steps(add)
        return Loaded(name, folder, kind, 0)

    def unload(self, name: str, timeout: float = 60.0) -> None:
        """As `EngineProtocol.unload`."""
        until = time.monotonic() + timeout
        with self._changed:
            if name not in self._folders or name in self._leaving:
                raise UserError(f"no pack or adapter {name!r} is loaded; there is {listed(self._available())}")
            self._leaving.add(name)
            try:
                while (users := self._users(name)) and not self._closing:
                    left = until - time.monotonic()
                    if left <= 0:
                        raise InUse(f"{users} requests still use {name!r} after {timeout:g} seconds; try again later")
                    self._changed.wait(left)
            except BaseException:
                self._leaving.discard(name)
                raise

        def remove() -> None:
            try:
                self._additions.take(name)
                self._prefixes.forget(name)
                with self._changed:
                    del self._folders[name]
            finally:
                with self._changed:
                    self._leaving.discard(name)

        with self._one_change:
            self._between_steps(remove)

    def loaded(self) -> Mapping[str, Loaded]:
        """As `EngineProtocol.loaded`."""
        with self._changed:
            return {
                name: Loaded(name, folder, kind, self._users(name))
                for name, (kind, folder) in sorted(self._folders.items())
                if name not in self._leaving
            }

    def stats(self) -> Stats:
        """As `EngineProtocol.stats`."""
        measures = self._measures
        with self._changed:
            waiting = len(self._prefill.waiting)
            running = len(self._active()) - waiting
        return Stats(
            waiting=waiting,
            running=running,
            slots=self.slots,
            cache_bytes=cache_bytes(self._cache) + self._prefixes.bytes(),
            cache_bytes_limit=self._cache_limit,
            prompt_tokens=measures.prompt_tokens,
            cached_tokens=measures.cached_tokens,
            generated_tokens=measures.generated_tokens,
            tokens_per_second=measures.tokens_per_second(),
            finished=dict(measures.finished),
            first_token_seconds=measures.first_token.histogram(),
            token_seconds=measures.token.histogram(),
            steps=measures.steps,
            use=self._watch.use(),
        )

    def drain(self, timeout: float | None = None) -> bool:
        """As `EngineProtocol.drain`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._closing or not self._active(), timeout)

    def close(self) -> None:
        """As `EngineProtocol.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self, request: Request) -> None:
        sampling = request.sampling
        length, room = len(request.prompt), min(sampling.max_tokens, 1)
        if length + room > self.context:
            raise UserError(
                f"the prompt has {length:,} tokens, but prompt and text together may have {self.context:,}; shorten it"
            )
        for name in ("prompt", "logit_bias", "stop_token_ids"):
            tokens = request.prompt if name == "prompt" else getattr(sampling, name)
            wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise UserError(f"{name} has the token id {wrong}; the model knows 0 to {self.vocab_size - 1}")

    def _check_free(self, name: str) -> None:
        if name in self._folders:
            raise UserError(f"{name!r} is loaded already; unload it first, or take another name")

    def _available(self) -> list[str]:
        return sorted(set(self._folders) - self._leaving)

    def _active(self) -> list[Running]:
        """All requests that have not ended."""
        return [*self._prefill.waiting, *self._prefill.unread(), *self._running]

    def _choices(self) -> list[Choice]:
        """What requests use that have not ended."""
        with self._changed:
            return [entry.choice for entry in self._active()]

    def _users(self, name: str) -> int:
        return sum(name in entry.request.packs for entry in self._active())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _between_steps(self, task: Callable[[], None]) -> None:
        """Run a task in the engine's thread; raises what it raises."""
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._tasks.append((task, done))
            self._changed.notify_all()
        done.result()

    def _serve(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self._round()
                except Exception as error:  # a request must not end the engine, whatever it has done
                    traceback.print_exc()
                    self._fail_all(error)
                with self._changed:
                    self._changed.notify_all()
        with self._changed:
            for entry in self._active():
                entry.end("cancelled")
            self._prefill.waiting.clear()
            self._prefill.stop()
            self._running.clear()
            for _, done in self._tasks:
                done.set_exception(RuntimeError("the engine is closed"))
            self._tasks.clear()
            self._cache.clear()
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for something to do; false where the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._tasks or self._active())
            return not self._closing

    def _round(self) -> None:
        while self._tasks:
            task, done = self._tasks.popleft()
            try:
                task()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)
        self._end_overdue()
        self._prefill.round()
        if self._running:
            self._step()

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            for entry in [*self._prefill.unread(), *self._running]:
                entry.fail(error)
            self._prefill.stop()
            self._running.clear()
            self._cache.clear()

    def _end_overdue(self) -> None:
        self._prefill.end_overdue()
        for row in reversed(range(len(self._running))):
            if reason := self._running[row].overdue():
                self._running[row].end(reason)
                self._leave(row)

    def _begin(self, entry: Running) -> bool:
        try:
            entry.choice = self._additions.choice(entry.request.packs, entry.request.prompt)
            entry.begin(self.tokenizer, self._ends, self.vocab_size)
        except Exception as error:
            entry.fail(error)
            return False
        return True

    def _start(self, entry: Running, found: Chosen | Exception, cache: Cache, row: int, rows: int) -> None:
        """Write the first token of a request whose prompt was read, and let it join the running ones."""
        self._measures.prompt_tokens += len(entry.request.prompt)
        self._measures.cached_tokens += entry.cached_tokens
        if not entry.request.sampling.max_tokens and not isinstance(found, Exception):
            entry.end("length")
        else:
            self._measures.step(self._write(entry, found, row, rows))
        if not isinstance(found, Exception):
            try:
                self._take_in(entry, cache, row)
            except Exception as error:  # its first token is written, so that its prompt must not be read again
                entry.fail(error)

    def _take_in(self, entry: Running, cache: Cache, row: int) -> None:
        """Keep what was read of a prompt, for others and for the request itself."""
        prompt = entry.request.prompt
        if self._prefixes.wants(entry.choice, prompt):
            self._prefixes.keep(entry.choice, prompt, last_tokens(cache, row, len(prompt)))
        if not entry.ended:
            self._cache.join(cache, row, len(prompt))
            with self._changed:
                self._running.append(entry)

    def _write(self, entry: Running, found: Chosen | Exception, row: int, rows: int) -> int:
        """Give a request its token, or end it with an error; returns how many tokens were written."""
        try:
            if isinstance(found, Exception):
                raise found
            experts = self._watch.of_row(row, rows) if entry.request.trace else None
            entry.write(found, self.context, experts)
        except Exception as error:  # of this request alone
            entry.fail(error)
            return 0
        return 1

    def _step(self) -> None:
        """Write one token for each running request."""
        self._cache.prepare()
        rows = len(self._running)
        try:
            logits = self._decode(slice(0, rows))
        except Exception as error:
            self._step_one_by_one(error)
            return
        found = choose(logits, [entry.sampler for entry in self._running])
        self._cache.advance()
        self._measures.step(sum(self._write(self._running[row], found[row], row, rows) for row in range(rows)))
        self._let_go({row for row in range(rows) if isinstance(found[row], Exception)})

    def _step_one_by_one(self, error: Exception) -> None:
        """The same where the pass has failed, by a pass for each row alone; rows that fail again end with an error."""
        spoiled, written = set(), 0
        for row, entry in enumerate(self._running):
            try:
                if len(self._running) == 1:
                    raise error
                (found,) = choose(self._decode(slice(row, row + 1)), [entry.sampler])
            except Exception as own:
                found = own
            if isinstance(found, Exception):
                spoiled.add(row)
            written += self._write(entry, found, 0, 1)
        self._cache.advance()
        self._measures.step(written)
        self._let_go(spoiled)

    def _let_go(self, spoiled: set[int]) -> None:
        """Free the rows of requests that have ended; `spoiled` ones may hold what is not finite."""
        for row in reversed(range(len(self._running))):
            if self._running[row].ended:
                self._leave(row, clean=row in spoiled)

    def _decode(self, rows: slice) -> Tensor:
        """Logits (rows, vocabulary) of some of the running requests."""
        entries = self._running[rows]
        self._cache.part = rows
        trace = any(entry.request.trace for entry in entries)
        with self._watch.watching(trace=trace) as watched, self._additions.chosen([each.choice for each in entries]):
            logits = self._forward.decode([entry.tokens[-1] for entry in entries], self._cache)
        if watched:
            self._watch.count(torch.ones(len(entries), 1, dtype=torch.bool, device=logits.device))
        return logits

    def _leave(self, row: int, *, clean: bool = False) -> None:
        """Free a row, whose last token was written and not read."""
        entry = self._running[row]
        tokens = entry.tokens[: self._cache.lengths[row]]
        if not clean and self._prefixes.wants(entry.choice, tokens):
            self._prefixes.keep(entry.choice, tokens, self._cache.row(row))
        self._cache.leave(row, clean=clean)
        with self._changed:
            self._running[row] = self._running[-1]
            del self._running[-1]


def _ends(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the generation configuration, as for `generate`, or else the tokenizer's."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return frozenset([] if found is None else found if isinstance(found, list) else [found])


def _size(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
