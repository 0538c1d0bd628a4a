"""What the head of a request must not say: the name of another server, or two lengths of its body."""

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from peerlm.serve.http.problems import Problem

_CLOSE = {"connection": "close"}


class Heads:
    """Refuse requests that a page of another site, or a proxy that was deceived, may have sent.

    A browser puts the name in a page's address into `Host`. A hostile page can let its own name lead to this machine
    (DNS rebinding); then the browser takes this server for the page's own. Requests without `Host` (HTTP/1.0) come
    from no browser. Where a body has two lengths, a proxy may have taken the other one.

    Args:
        app: what answers.
        hosts: names to answer to, besides those of `is_loopback`; None for all names.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] | None) -> None:
        self.app = app
        self.hosts = None if hosts is None else frozenset(map(_plain, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        problem = self._problem(Headers(scope=scope)) if scope["type"] == "http" else None
        await (problem.response() if problem else self.app)(scope, receive, send)

    def _problem(self, headers: Headers) -> Problem | None:
        if "transfer-encoding" in headers and "content-length" in headers:
            message = "the request has both Content-Length and Transfer-Encoding; send one of them"
            return Problem(400, message, code="two_lengths", headers=_CLOSE)
        given = headers.get("host")
        if self.hosts is None or given is None:
            return None
        name = _plain(_without_port(given))
        if name in self.hosts or is_loopback(name):
            return None
        message = f"this server does not answer to the name {name!r}; start it with --allow-host and the name to do so"
        return Problem(421, message, code="wrong_host", headers=_CLOSE)


def is_loopback(name: str) -> bool:
    """Whether a name, or an address with or without brackets, always means this machine."""
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _plain(name: str) -> str:
    return name.strip().lower().removesuffix(".")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdigit() or not port) and not name.endswith(":") else host
