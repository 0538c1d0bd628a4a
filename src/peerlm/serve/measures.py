"""What an engine counts while it runs."""

import bisect
import time
from collections import Counter, deque

from peerlm.serve.protocol import Histogram

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds."""
WINDOW = 10.0
"""Seconds over which tokens per second are taken."""


class Seconds:
    """Counts of seconds by size."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def histogram(self) -> Histogram:
        """The counts so far."""
        return Histogram(BOUNDS, tuple(self._counts), self._total)


class Measures:
    """Counters of one engine, which its thread alone changes."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.steps = 0
        self.finished: Counter[str] = Counter()
        self.first_token, self.token = Seconds(), Seconds()
        self._recent: deque[tuple[float, int]] = deque()

    def step(self, tokens: int) -> None:
        """Count a forward pass that wrote so many tokens."""
        now = time.monotonic()
        self.steps += 1
        self.generated_tokens += tokens
        self._recent.append((now, tokens))
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def tokens_per_second(self) -> float:
        """Tokens written in the last seconds, per second."""
        since = time.monotonic() - WINDOW
        return sum(tokens for when, tokens in list(self._recent) if when >= since) / WINDOW
