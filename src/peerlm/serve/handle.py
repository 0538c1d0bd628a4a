"""A request's events, from the engine's thread to whoever reads them."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from peerlm.serve.request import Event


class Handle:
    """The events of a submitted request, for one reader: iterate over it in any thread, or with `async for`.

    Iteration ends after the event with a finish reason. Events wait here until they are read.

    Args:
        on_cancel: called at the first `cancel()` before the request has ended.
    """

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False
        self._cancelled = False
        self._on_cancel = on_cancel

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the request soon, with the finish reason "cancelled"; nothing happens where it has ended. Any thread."""
        with self._changed:
            first = not self._cancelled and not self._ended
            self._cancelled = True
        if first and self._on_cancel is not None:
            self._on_cancel()

    def put(self, event: Event) -> None:
        """For engines: the next event. After one with a finish reason, further ones raise RuntimeError."""
        with self._changed:
            if self._ended:
                raise RuntimeError("the request has ended; it can have no further event")
            self._ended = event.finish_reason is not None
            self._events.append(event)
            self._changed.notify_all()
            waiter = self._waiter
        if waiter is not None:
            loop, flag = waiter
            try:
                loop.call_soon_threadsafe(flag.set)
            except RuntimeError:  # the reader's loop is closed: nobody waits any more
                self.cancel()

    def __iter__(self) -> Iterator[Event]:
        """The events to come."""
        return self

    def __next__(self) -> Event:
        """The next event; waits for it."""
        with self._changed:
            while not self._events and not self._ended:
                self._changed.wait()
            return self._take(StopIteration)

    def __aiter__(self) -> AsyncIterator[Event]:
        """The events to come."""
        return self

    async def __anext__(self) -> Event:
        """The next event; waits for it without blocking the loop."""
        while True:
            with self._changed:
                if self._events or self._ended:
                    return self._take(StopAsyncIteration)
                flag = asyncio.Event()
                self._waiter = (asyncio.get_running_loop(), flag)
            try:
                await flag.wait()
            finally:
                with self._changed:
                    self._waiter = None

    def _take(self, end: type[Exception]) -> Event:
        if not self._events:
            raise end
        return self._events.popleft()
