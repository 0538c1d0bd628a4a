"""The process that serves: listens, finishes what runs when it is told to stop, and ends with code 0."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from peerlm.errors import UserError
from peerlm.serve.http.connection import Connection
from peerlm.serve.http.served import ServedModel

_HEADER_BYTES = 64 * 1024


class Server(uvicorn.Server):
    """Uvicorn that drains: the first signal refuses new requests and lets running ones end, the second ends at once.

    Args:
        app: what answers.
        served: what its routes share.
        drain_seconds: how long running requests may take after the first signal.
        on_start: called once it listens.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        served: ServedModel,
        drain_seconds: float = 60.0,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        connection = partial(
            Connection,
            head_seconds=served.settings.body_seconds,
            stall_seconds=served.settings.deadline_seconds,
        )
        config = uvicorn.Config(
            app,
            http=connection,  # type: ignore[arg-type] # it is called, no more
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=5,
            ws="none",
            lifespan="off",
        )
        super().__init__(config)
        self.served = served
        self.drain_seconds = drain_seconds
        self.on_start = on_start
        self._stops = 0

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stops > 0

    def stop(self) -> None:
        """Drain; where this runs already, end at once."""
        self._stops += 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.on_start()

    async def main_loop(self) -> None:
        """Wait for `stop`, and then until the engine has ended what it runs; not longer than a second `stop`."""
        ticks, draining = 0, None
        while not self.should_exit:
            await self.on_tick(ticks)
            ticks += 1
            if self._stops and draining is None:
                self.served.draining = True
                draining = asyncio.create_task(asyncio.to_thread(self.served.engine.drain, self.drain_seconds))
            if self._stops > 1:
                self.force_exit = self.should_exit = True
            elif draining is not None and draining.done():
                self.should_exit = True
            else:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(self.served.engine.close)
        self.served.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals stop the server, which then ends with code 0 in place of being killed by them."""
        try:
            before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # no main thread: whoever started it calls `stop`
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.stop()


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet; port 0 takes a free one.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port} ({why}); give another --host or --port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The address to type: of this machine where the socket is bound to all."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"
