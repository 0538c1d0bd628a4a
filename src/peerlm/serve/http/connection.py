"""A client's connection: closed where no request comes or no answer is read; bad HTTP gets an error object."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from peerlm.serve.http.problems import Problem


class Connection(H11Protocol):
    """Uvicorn's HTTP/1.1 in Python, which bounds heads, with times that it does not bound.

    Args:
        head_seconds: how long a connection may wait for the whole head of its next request.
        stall_seconds: how long a client may leave an answer unread, where the system holds no more of it.
        options: as uvicorn gives them.
    """

    def __init__(self, *, head_seconds: float, stall_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._head_seconds = head_seconds
        self._stall_seconds = stall_seconds
        self._no_head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As asyncio calls it."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        """As uvicorn calls it."""
        super().on_response_complete()
        self._expect_head()

    def pause_writing(self) -> None:
        """As asyncio calls it: the client does not read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """As asyncio calls it, and uvicorn at the end."""
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        super().connection_lost(exc)
        self._no_head = _cancelled(self._no_head)
        self._stalled = _cancelled(self._stalled)

    def send_400_response(self, msg: str) -> None:
        """Say that a request is no HTTP, and close; where an answer has begun, close alone."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = Problem(400, f"{msg} Send HTTP/1.1 with a head of at most 64 KiB.", code="no_http").response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        """Close in some seconds, if no request is answered until then; bytes that trickle in do not put that off."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._no_head = _cancelled(self._no_head)
        elif self._no_head is None and not self.transport.is_closing():
            self._no_head = self.loop.call_later(self._head_seconds, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What takes the place of a timer that is not needed any more."""
    if timer is not None:
        timer.cancel()
    return None
