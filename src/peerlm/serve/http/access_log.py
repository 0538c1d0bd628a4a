"""One line of JSON for each request: what it was, how it ended, how long it took; never its text unless asked for."""

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peerlm.serve.http.figures import HttpMetrics
from peerlm.serve.http.problems import readable

_MOST_ID = 128


class AccessLog:
    """Write a line for each request, and count it.

    Args:
        app: what answers.
        write: takes a line; None writes none.
        metrics: counts answers.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], object] | None, metrics: HttpMetrics) -> None:
        self.app = app
        self.write = write
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499
        details = scope.setdefault("state", {}).setdefault("details", {})
        request_id = _request_id(scope)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except BaseException:
            status = 500 if status < 500 else status
            raise
        finally:
            seconds = time.monotonic() - started
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            if self.write is not None:
                line = {
                    "time": round(time.time(), 3),
                    "request": request_id,
                    "method": scope["method"],
                    "path": readable(scope["path"]),
                    "status": status,
                    "seconds": round(seconds, 4),
                    **_generated(details),
                }
                self.write(json.dumps(line))


def _request_id(scope: Scope) -> str:
    """The client's own, where it is short and plain, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    if given.isascii() and given.isprintable() and 0 < len(given) <= _MOST_ID:
        return given
    return uuid.uuid4().hex


def _generated(details: dict[str, Any]) -> dict[str, Any]:
    """What a request wrote: counts, and texts only where they were put here."""
    found = {name: value for name, value in details.items() if name != "generation"}
    generation = details.get("generation")
    if generation is not None:
        found |= {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "finishes": generation.finishes,
        }
        if generation.texts is not None:
            found["texts"] = generation.texts
        if generation.first_seconds is not None:
            found["first_token_seconds"] = round(generation.first_seconds, 4)
    return found
