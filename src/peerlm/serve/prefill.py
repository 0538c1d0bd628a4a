"""Prompts that wait and are read: which ones together, in which parts, and from which kept prefix on."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import Cache

from peerlm.serve.additions import Additions
from peerlm.serve.forward import Forward
from peerlm.serve.prefixes import Prefixes
from peerlm.serve.sampling import Chosen, choose, logprobs_of
from peerlm.serve.sequence import Running
from peerlm.serve.watch import Watch

MOST_PASSES = 8
"""So many passes read prompts between two steps at the most; short parts of prompts take one each."""


class Prefill:
    """Requests whose prompts are not read yet; the engine's thread reads them.

    A pass that fails is repeated for each of its prompts alone; those that fail again end with an error.

    Args:
        forward, watch, additions, prefixes: the engine's.
        running: requests that run already, to which `start` adds.
        chunk: tokens that a round reads, padding included.
        slots: most requests that are read or run.
        changed: is held while requests move, so that other threads see each in one place.
        begin: prepares a request to be read; where it cannot, ends it and returns false.
        start: takes a request that was read, its first token or why there is none, the cache, its row of how many.

    Attributes:
        waiting: requests that nothing was read of, the first first.
    """

    def __init__(
        self,
        forward: Forward,
        watch: Watch,
        additions: Additions,
        prefixes: Prefixes,
        running: list[Running],
        *,
        chunk: int,
        slots: int,
        changed: threading.Condition,
        begin: Callable[[Running], bool],
        start: Callable[[Running, Chosen | Exception, Cache, int, int], None],
    ):
        self._forward, self._watch, self._additions, self._prefixes = forward, watch, additions, prefixes
        self._running, self._chunk, self._slots, self._changed = running, chunk, slots, changed
        self._begin, self._start = begin, start
        self.waiting: deque[Running] = deque()
        self._reading: list[Running] = []
        self._read: Cache | None = None
        self._by_parts = False

    def round(self) -> None:
        """Read prompts, as much as a chunk has room for, and write the first tokens of those that were read whole."""
        room = self._chunk
        while room > 0 and (self._reading or self._take_waiting(room)):
            work = self._read_part if self._by_parts else self._read_whole
            room -= max(self._apart(list(self._reading), work), self._chunk // MOST_PASSES)
            with self._changed:
                if all(entry.ended or entry in self._running for entry in self._reading):
                    self.stop()

    def unread(self) -> list[Running]:
        """Requests that are being read, and do not run yet."""
        return [entry for entry in self._reading if entry not in self._running]

    def end_overdue(self) -> None:
        """End requests whose time is over, or which were cancelled."""
        with self._changed:
            for entry in [entry for entry in self.waiting if entry.overdue()]:
                self.waiting.remove(entry)
                entry.end(str(entry.overdue()))
            for entry in self._reading:
                if reason := entry.overdue():
                    entry.end(reason)
                    self.stop()

    def stop(self) -> None:
        """Read no further in those that are being read."""
        self._reading, self._read, self._by_parts = [], None, False

    def _take_waiting(self, room: int) -> bool:
        """Choose the requests to be read next: some that fit together, or one that is long or known in part."""
        longest = 0
        while self.waiting and len(self._running) + len(self._reading) < self._slots:
            entry = self.waiting[0]
            if not entry.begun and not self._begin(entry):
                with self._changed:
                    self.waiting.popleft()
                continue
            prompt = entry.request.prompt
            cached, cache = 0, None
            if entry.request.sampling.prompt_logprobs is None:
                cached, cache = self._prefixes.find(entry.choice, prompt)
            by_parts = cache is not None or len(prompt) > self._chunk
            if self._reading and (by_parts or (len(self._reading) + 1) * max(longest, len(prompt)) > room):
                break
            same = any(other.request.prompt == prompt and other.choice == entry.choice for other in self._reading)
            if same and entry.request.sampling.prompt_logprobs is None and self._prefixes.wants(entry.choice, prompt):
                break  # once it is read, it is known
            longest = max(longest, len(prompt))
            with self._changed:
                self._reading.append(self.waiting.popleft())
            if by_parts:
                entry.cached_tokens, self._read, self._by_parts = cached, cache, True
                break
        return bool(self._reading)

    def _apart(self, entries: list[Running], work: Callable[[list[Running]], int]) -> int:
        """Do work for requests together, and where that fails for each alone; those that fail again end with an error.

        Returns what the work returns, summed up.
        """
        try:
            return work(entries)
        except Exception as error:
            left = [entry for entry in entries if not entry.ended and entry not in self._running]
            if len(entries) > 1:
                return sum(self._apart([entry], work) for entry in left if self._begin(entry))
            for entry in left:
                entry.fail(error)
            return 0

    def _read_whole(self, entries: list[Running]) -> int:
        """Read whole prompts in one pass; returns how many tokens that were, with padding."""
        prompts = [entry.request.prompt for entry in entries]
        logits, cache = self._pass(entries, prompts, None)
        for row, found in enumerate(choose(logits, [entry.sampler for entry in entries])):
            self._start(entries[row], found, cache, row, len(entries))
        return len(prompts) * max(map(len, prompts))

    def _read_part(self, entries: list[Running]) -> int:
        """Read the next part of a prompt; returns how many tokens that were."""
        (entry,) = entries
        past = 0 if self._read is None else self._read.get_seq_length()
        part = entry.request.prompt[past : past + self._chunk]
        logits, self._read = self._pass(entries, [part], self._read)
        if past + len(part) == len(entry.request.prompt):
            (found,) = choose(logits, [entry.sampler])
            self._start(entry, found, self._read, 0, 1)
        return len(part)

    def _pass(
        self, entries: list[Running], prompts: Sequence[Sequence[int]], cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Logits after the last token of each row (rows, vocabulary), and the cache."""
        wants = any(entry.request.sampling.prompt_logprobs is not None for entry in entries)
        trace = any(entry.request.trace for entry in entries)
        with self._watch.watching(trace=trace) as watched, self._additions.chosen([each.choice for each in entries]):
            logits, cache, mask = self._forward.prefill(prompts, cache, all_logits=wants)
        if watched:
            self._watch.count(mask.to(logits.device))
        for row, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
            top = entry.request.sampling.prompt_logprobs
            if top is not None:
                known = len(entry.prompt_logprobs)
                following = entry.request.prompt[known : known + len(prompt)]
                own = logits[row, logits.shape[1] - len(prompt) :][: len(following)]
                entry.prompt_logprobs += logprobs_of(own, following, top)
        return logits[:, -1], cache
