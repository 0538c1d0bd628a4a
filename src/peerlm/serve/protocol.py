"""What a serving engine offers to the doors that clients come through."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peerlm.serve.handle import Handle
from peerlm.serve.request import Request


class QueueFull(Exception):  # noqa: N818, an outcome, not a mistake: the client comes again later
    """As many requests wait as may; the message is one sentence."""


class InUse(Exception):  # noqa: N818, an outcome, not a mistake
    """Requests that run still use what is to be unloaded; the message is one sentence."""


@dataclass(frozen=True)
class Loaded:
    """A pack or an adapter beside the model."""

    name: str
    folder: Path
    """An empty path where it was beside the model already."""
    kind: str
    """ "pack", "adapter" or "library"."""
    running: int
    """Requests that use it now, those that wait included."""


@dataclass(frozen=True)
class Histogram:
    """Counts of measured values."""

    bounds: tuple[float, ...]
    """Upper bounds, ascending."""
    counts: tuple[int, ...]
    """Values at most as large as each bound and above the one before, then those above the last: one more number."""
    total: float
    """The sum of all values."""


@dataclass(frozen=True)
class LayerUse:
    """How evenly the tokens that were read use a layer's experts; estimates where very many are used."""

    experts: int
    share: float
    """Of the experts that any token used, 0 to 1."""
    unevenness: float
    """Nats, as `peerlm.usage` defines it: 0 when all are used alike."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine has done since it began, and does now."""

    waiting: int
    """Requests in the queue."""
    running: int
    """Requests that have a slot."""
    slots: int
    cache_bytes: int
    """Bytes that the cache of all slots has now."""
    cache_bytes_limit: int
    """Bytes that it has at the most."""
    prompt_tokens: int
    """Tokens of prompts, those included that were not read again."""
    cached_tokens: int
    """Tokens of prompts that were not read again."""
    generated_tokens: int
    tokens_per_second: float
    """Written in the last 10 seconds, per second."""
    finished: Mapping[str, int]
    """Requests that have ended, by finish reason."""
    first_token_seconds: Histogram
    """From submission to the first event."""
    token_seconds: Histogram
    """Between the tokens of a request."""
    steps: int
    """Forward passes that wrote tokens."""
    use: Mapping[str, LayerUse] = field(default_factory=dict)
    """By the path of each layer with experts."""


class EngineProtocol(Protocol):
    """An engine, as the HTTP API knows it. All methods may be called from any thread.

    Attributes:
        tokenizer: of transformers.
        context: most tokens of a sequence, prompt and text together.
        vocab_size: token ids are below it.
    """

    tokenizer: Any
    context: int
    vocab_size: int

    def submit(self, request: Request) -> Handle:
        """Queue a request; returns at once.

        Where prompt and max_tokens together are longer than the context, the text ends at the context's end, with the
        finish reason "length".

        Raises:
            QueueFull: as many requests wait as may, or the engine drains.
            ValueError: the prompt leaves no room in the context for a token, has token ids that the model does not
                know, or names a pack that is not loaded; other ids in `sampling` are out of range.
        """

    def load(self, name: str, folder: str | Path) -> Loaded:
        """Load a pack (`peerlm.packs`), a LoRA adapter as peft saves it, or a library of adapters.

        Requests keep running meanwhile, and none uses it unless it names it. Blocks until it is loaded.

        Raises:
            ValueError: the name is taken or unusual, or the folder is damaged or belongs to another model.
        """

    def unload(self, name: str, timeout: float = 60.0) -> None:
        """Unload what `load` loaded: from now on it is unknown to new requests; blocks until running ones have ended.

        Afterwards the model has the bits that it had before.

        Raises:
            ValueError: nothing of this name is loaded.
            InUse: running requests have not ended within `timeout` seconds; it stays loaded.
        """

    def loaded(self) -> Mapping[str, Loaded]:
        """What is loaded now, by name."""

    def stats(self) -> Stats:
        """Counts and figures of now."""

    def drain(self, timeout: float | None = None) -> bool:
        """Take no further request, and wait until all have ended; False where `timeout` seconds did not suffice."""

    def close(self) -> None:
        """End all requests with "cancelled" and stop; nothing happens a second time."""
