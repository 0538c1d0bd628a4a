"""The app: routes, and what requests pass before they reach them."""

from collections.abc import Callable

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from peerlm import __version__
from peerlm.serve.http import chat, completions, metrics, models, page, tokens
from peerlm.serve.http.access_log import AccessLog
from peerlm.serve.http.figures import HttpMetrics
from peerlm.serve.http.gates import Keys, SafeHeaders, WholeBody
from peerlm.serve.http.heads import Heads
from peerlm.serve.http.problems import answer_problems
from peerlm.serve.http.served import ServedModel
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.http.texts import Texts
from peerlm.serve.protocol import EngineProtocol


def create_app(
    engine: EngineProtocol, texts: Texts, settings: HttpSettings, *, log: Callable[[str], object] | None = None
) -> FastAPI:
    """The HTTP API over an engine.

    Args:
        engine: writes the tokens.
        texts: its tokenizer.
        settings: names, limits and secrets.
        log: takes a line of JSON for each request.

    Returns:
        An ASGI app; `app.state.served` is what its routes share.
    """
    app = FastAPI(
        title="peerlm",
        version=__version__,
        description="A language model behind OpenAI's API, with packs of experts as models.",
        docs_url=None,
        redoc_url=None,
    )
    served = ServedModel(engine, texts, settings, HttpMetrics(engine))
    app.state.served = served
    answer_problems(app)
    routers = (
        completions.router,
        chat.router,
        models.router,
        models.packs_router,
        tokens.router,
        metrics.router,
        page.router,
    )
    for router in routers:
        app.include_router(router)
    # The last one added is the first that a request passes.
    app.add_middleware(WholeBody, most_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(Keys, keys=settings.api_keys, admin_token=settings.admin_token)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(Heads, hosts=settings.hosts)
    app.add_middleware(SafeHeaders)
    app.add_middleware(AccessLog, write=log, metrics=served.metrics)
    return app
