"""What all routes share: the engine, its texts, the settings, and whether the server is about to stop."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from peerlm.serve.http.catalogue import packs_of
from peerlm.serve.http.figures import HttpMetrics
from peerlm.serve.http.problems import Problem
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.http.texts import Texts
from peerlm.serve.protocol import EngineProtocol

T = TypeVar("T")


class ServedModel:
    """A model that is served.

    Args:
        engine: writes the tokens.
        texts: its tokenizer.
        settings: of whoever started the server.
        metrics: counts answers.
    """

    def __init__(self, engine: EngineProtocol, texts: Texts, settings: HttpSettings, metrics: HttpMetrics) -> None:
        self.engine = engine
        self.texts = texts
        self.settings = settings
        self.metrics = metrics
        self.created = int(time.time())
        self.draining = False
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._loading = ThreadPoolExecutor(1, "load")

    async def tokenized(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """The result of a function that may take the tokenizer a while, from the one thread that uses it so."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, lambda: function(*arguments, **options))

    async def changed(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function that loads or unloads; one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._loading, lambda: function(*arguments))

    def packs(self, model: str) -> tuple[str, ...]:
        """The packs that a model's name stands for.

        Raises:
            Problem: the server stops, 503; there is no such model, 404.
        """
        if self.draining:
            message = "the server stops: it finishes what runs and takes nothing new; ask another one"
            raise Problem(503, message, code="draining", headers={"retry-after": "5", "connection": "close"})
        return packs_of(model, self.settings.name, self.engine.loaded())

    def close(self) -> None:
        """End the threads."""
        self._tokenizing.shutdown(wait=False)
        self._loading.shutdown(wait=False)


def _served(request: Request) -> ServedModel:
    served: ServedModel = request.app.state.served
    return served


Served = Annotated[ServedModel, Depends(_served)]
