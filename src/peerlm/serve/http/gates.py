"""What every request passes first: the size of its body, its key, and the headers of every answer."""

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peerlm.serve.http.problems import Problem

OPEN = ("/", "/health")
"""Paths without a key, besides those of the page's files."""
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths that change the server, and need the administrator's token."""
SAFE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_READ_ON = 8
"""A body too large is read and thrown away up to this many times the limit, so that its sender hears why."""


class SafeHeaders:
    """Put headers on every answer that keep browsers from doing more than the page needs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class Keys:
    """Refuse requests without one of the keys, and administrators' requests without the token.

    Keys are compared by their digests in constant time, each of them every time.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], admin_token: str | None) -> None:
        self.app = app
        self.keys = [_digest(key) for key in keys]
        self.admin = [_digest(admin_token)] if admin_token else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        await (problem.response() if problem else self.app)(scope, receive, send)

    def _problem(self, scope: Scope) -> Problem | None:
        path = scope["path"]
        if path in ADMIN:
            if not self.admin:
                return Problem(
                    403, "packs are fixed: start the server with --admin-token to change them", code="no_admin_token"
                )
            if not _knows(self.admin, _given(scope)):
                return _refused("this needs the administrator's token: Authorization: Bearer TOKEN")
        elif self.keys and path not in OPEN and not path.startswith("/page/"):
            given = _given(scope)
            if not (_knows(self.keys, given) | _knows(self.admin, given)):
                return _refused("this server needs a key that it knows: Authorization: Bearer KEY")
        return None


def _refused(message: str) -> Problem:
    return Problem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _given(scope: Scope) -> bytes:
    """The digest of the key that a request brings."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return _digest(key.strip() if scheme.lower() == "bearer" else "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _knows(digests: list[bytes], given: bytes) -> bool:
    """Whether the digest is one of them, in time that does not depend on which."""
    found = False
    for digest in digests:
        found |= hmac.compare_digest(digest, given)
    return found


class WholeBody:
    """Read a request's body before the app sees it: not more than a number of bytes, and within some seconds."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        self.app = app
        self.most_bytes = most_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self.seconds)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self.seconds:g} seconds"
            problem = Problem(408, message, code="slow_body", headers={"connection": "close"})
            await problem.response()(scope, receive, send)
            return
        if body is None:  # the client has left
            return
        if len(body) > self.most_bytes:
            message = f"the body has more than {self.most_bytes:,} bytes, the most that this server reads"
            problem = Problem(413, message, code="body_too_large", headers={"connection": "close"})
            await problem.response()(scope, receive, send)
            return
        given = False

        async def receive_whole() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or so much of it that it is too large."""
        parts, size, more = [], 0, True
        while more and size <= _READ_ON * self.most_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if size <= self.most_bytes:
                parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
        return b"".join(parts)
