"""The command that serves a model over HTTP."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from peerlm.cli.extras import require_serve
from peerlm.cli.root import DeviceRows, DocumentStart, Run, app
from peerlm.errors import UserError

_KEYS = "PEERLM_API_KEYS"
_TOKEN = "PEERLM_ADMIN_TOKEN"


@app.command(
    examples=[
        "peerlm serve runs/a",
        "peerlm serve runs/a --pack law=packs/law --pack code=packs/code --port 9000",
        "PEERLM_API_KEYS=KEY1,KEY2 PEERLM_ADMIN_TOKEN=TOKEN peerlm serve runs/a --host 0.0.0.0 --pack-folder packs",
    ]
)
def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: the folder's name.")] = None,
    pack: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FOLDER", help="A pack, a LoRA adapter or a library of adapters to load first; repeatable."
        ),
    ] = [],  # noqa: B006
    pack_folder: Annotated[
        Path | None, typer.Option(help="Folder below which packs may be loaded over HTTP; needs an admin token.")
    ] = None,
    api_key: Annotated[
        list[str], typer.Option(help=f"A key that clients must send; repeatable. Or {_KEYS}, with commas between.")
    ] = [],  # noqa: B006
    admin_token: Annotated[
        str | None, typer.Option(envvar=_TOKEN, help="Token for loading and unloading packs over HTTP.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of prompt and text; default: as trained.")] = None,
    slots: Annotated[int, typer.Option(help="Requests that are written at once.", min=1)] = 32,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get 429.", min=1)] = 256,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that a request may ask for; default: the context.", min=1)
    ] = None,
    deadline: Annotated[float, typer.Option(help="Most seconds of a request, waiting included.", min=0.001)] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that running requests have after SIGTERM.", min=0)] = 60.0,
    max_body: Annotated[float, typer.Option(help="Largest body of a request: MiB.", min=0.001)] = 4.0,
    allow_origin: Annotated[
        list[str], typer.Option(help="A web site whose pages may use this server, as https://a.b; repeatable.")
    ] = [],  # noqa: B006
    allow_host: Annotated[
        list[str],
        typer.Option(
            help="A name by which clients reach this server, as in http://NAME; repeatable. Without --host, others "
            "than localhost are refused."
        ),
    ] = [],  # noqa: B006
    document_start: DocumentStart = "auto",
    device_rows: DeviceRows = 0,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Write a line of JSON per request to stderr.")] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Put prompts into the log.")] = False,
) -> None:
    """Serve a model behind OpenAI's API, with a page to try it, packs as models, and many requests in one batch.

    Clients of OpenAI work unchanged with the base URL http://HOST:PORT/v1. A pack NAME is the model BASE:NAME, several
    at once are BASE:NAME+NAME. SIGTERM lets running requests end; a second one ends the server at once.
    """
    require_serve()
    from peerlm.serve.http.run import ServeOptions, serve_model
    from peerlm.serve.http.settings import HttpSettings

    keys = (*api_key, *(key.strip() for key in os.environ.get(_KEYS, "").split(",") if key.strip()))
    if not all(keys) or admin_token == "":
        raise UserError("a key or token is empty: give one of at least one character, or leave the option out")
    if pack_folder is not None and not pack_folder.is_dir():
        raise UserError(f"--pack-folder {pack_folder} is not a folder: name the one that has the packs")
    if pack_folder is not None and admin_token is None:
        raise UserError(f"--pack-folder needs --admin-token, or {_TOKEN}: without it no one may load packs")
    settings = HttpSettings(
        name=name or run.resolve().name,
        api_keys=keys,
        admin_token=admin_token,
        packs_folder=pack_folder,
        max_body_bytes=int(max_body * 2**20),
        max_new_tokens=max_new_tokens,
        deadline_seconds=deadline,
        allow_origins=tuple(allow_origin),
        log_prompts=log_prompts,
    )
    options = ServeOptions(
        host=host,
        port=port,
        allow_hosts=tuple(allow_host),
        packs=dict(map(_named, pack)),
        context=context,
        slots=slots,
        queue=queue,
        drain_seconds=drain,
        document_start=document_start,
        device_rows=device_rows,
    )
    serve_model(run, settings, options, say=typer.echo, log=_write_line if log else None)


def _named(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--pack is {given!r}: write NAME=FOLDER")
    return name, Path(folder)


def _write_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
