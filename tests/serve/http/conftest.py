"""A server in a thread, over the toy engine or a real one, and clients for it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from peerlm.data.tokenizer import train_tokenizer
from peerlm.marks import document_marks
from peerlm.serve.http.app import create_app
from peerlm.serve.http.server import Server, address_of, bind
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.http.texts import Texts

from .toy import ToyEngine

TEXT = "The old keeper climbed the stairs and lit the lamp. A café, 灯台 守: that was all."
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Running:
    """A server that runs in a thread, and clients for it."""

    def __init__(self, engine: Any, settings: HttpSettings, tokenizer: Any):
        self.engine = engine
        self.log: list[str] = []
        self.app = create_app(engine, Texts(tokenizer, document_marks(tokenizer)), settings, log=self.log.append)
        served = self.app.state.served
        self.listener = bind("127.0.0.1", 0)
        self.url = address_of(self.listener)
        self.server = Server(self.app, served=served, drain_seconds=5)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self._thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.http = httpx2.Client(base_url=self.url, timeout=20)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(path, json={"model": "toy", **body})

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop_listening(self) -> None:
        if not self.server.is_stopping:
            self.server.stop()
        self._thread.join()

    def stop(self) -> None:
        self.http.close()
        self.openai.close()
        self.stop_listening()
        self.engine.close()


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    tokenizer = train_tokenizer([TEXT] * 3, vocab_size=300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="package")
def packs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(scope="package")
def start(tokenizer, packs_folder) -> Iterator[Callable[..., Running]]:
    """A function: settings, and `engine_` options of the toy engine -> a running server."""
    started = []

    def begin(**options: Any) -> Running:
        own = {name.removeprefix("engine_"): options.pop(name) for name in list(options) if name.startswith("engine_")}
        settings = HttpSettings(**{"name": "toy", "packs_folder": packs_folder, "admin_token": "admin", **options})
        started.append(Running(ToyEngine(tokenizer, **own), settings, tokenizer))
        return started[-1]

    yield begin
    for running in started:
        running.server.stop()
    for running in started:
        running.stop()


@pytest.fixture(scope="package")
def toy(start) -> Running:
    """A server over the toy engine, as most tests need it."""
    return start()
