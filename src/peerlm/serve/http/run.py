"""From a folder to a server that answers: load, listen, say how to ask, serve until told to stop."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peerlm.errors import UserError
from peerlm.evaluate.loading import default_context, load_model
from peerlm.marks import AUTO, marks_of
from peerlm.serve.engine import Engine
from peerlm.serve.http.app import create_app
from peerlm.serve.http.heads import is_loopback
from peerlm.serve.http.server import Server, address_of, bind
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.http.texts import Texts


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, and how its engine works."""

    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: tuple[str, ...] = ()
    """Names that clients use for this server; without any, an address of this machine alone has those of it alone."""
    packs: Mapping[str, Path] = field(default_factory=dict)
    """Folders of packs and adapters to load first, by name."""
    context: int | None = None
    """Most tokens of prompt and text; None: as trained."""
    slots: int = 32
    queue: int = 256
    drain_seconds: float = 60.0
    document_start: str = AUTO
    device_rows: int = 0
    """Rows of each table that the GPU has places for; 0: tables are moved whole."""


def serve_model(
    path: str | Path,
    settings: HttpSettings,
    options: ServeOptions,
    *,
    say: Callable[[str], object],
    log: Callable[[str], object] | None,
) -> None:
    """Serve a model until a signal stops it.

    Args:
        path: as `load_model`.
        settings: names, limits and secrets.
        options: address and engine.
        say: is told what to type next.
        log: takes a line of JSON for each request.

    Raises:
        UserError: the model, a pack, or the address cannot be used.
    """
    with bind(options.host, options.port) as address:
        model, tokenizer = load_model(path, device_rows=options.device_rows)
        marks = marks_of(model, tokenizer, options.document_start)
        try:
            engine = Engine(
                model,
                tokenizer,
                slots=options.slots,
                queue=options.queue,
                context=default_context(path, model) if options.context is None else options.context,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            for name, folder in options.packs.items():
                try:
                    engine.load(name, folder)
                except ValueError as error:
                    raise UserError(f"--pack {name}={folder}: {error}") from error
            if options.allow_hosts or is_loopback(address.getsockname()[0]):
                settings = replace(settings, hosts=(options.host, *options.allow_hosts))
            app = create_app(engine, Texts(tokenizer, marks), settings, log=log)
            lines = greeting(address_of(address), settings, tuple(options.packs))
            server = Server(
                app,
                served=app.state.served,
                drain_seconds=options.drain_seconds,
                on_start=lambda: say("\n".join(lines)),
            )
            server.run(sockets=[address])
        finally:
            engine.close()


def greeting(address: str, settings: HttpSettings, packs: tuple[str, ...]) -> list[str]:
    """What the server says when it begins: where it is, and a request to try."""
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    body = shlex.quote(json.dumps({"model": settings.name, "prompt": "The", "max_tokens": 20}))
    lines = [f"Serving {settings.name} at {address} - open it in a browser, or ask:"]
    lines.append(f"  curl {address}/v1/completions -H 'Content-Type: application/json'{key} -d {body}")
    if packs:
        lines.append(f"Packs are models too: {', '.join(f'{settings.name}:{pack}' for pack in packs)}")
    if not settings.api_keys and not address.startswith(("http://127.0.0.1:", "http://[::1]:")):
        lines.append("Whoever reaches this address may use the model: give --api-key to ask for a key.")
    return lines
