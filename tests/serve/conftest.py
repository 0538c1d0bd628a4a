"""An engine over a small model, and what the same model writes alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel

from peerlm.serve import Engine, Event, Handle, Request, SamplingParams

from ..models import PEER_SETTINGS, build

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "peer": ("peer", {"ffw_layers": "peer", "peer": PEER_SETTINGS}),
    "peer with shifts": (
        "peer",
        {"ffw_layers": "peer", "peer": PEER_SETTINGS, "kv_shift": True, "num_key_value_heads": 2},
    ),
    "peer with shifts and sinks": (
        "peer",
        {
            "ffw_layers": "peer",
            "peer": PEER_SETTINGS,
            "kv_shift": True,
            "attention_sink": True,
            "qk_norm": True,
            "num_key_value_heads": 1,
        },
    ),
    "n-grams": ("peer", {"ffw_layers": "hashed_ngrams+dense", "hashed_ngrams": {"num_rows": 512, "hashes": 2}}),
}


class Letters:
    """A tokenizer whose token n is the n-th letter, again from a after z."""

    eos_token_id = None
    added_tokens_decoder = {63: AddedToken("<end>", special=True)}  # noqa: RUF012

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """One letter for each token."""
        return "".join(chr(97 + token % 26) for token in ids)


def make(name: str) -> PreTrainedModel:
    """A model that never ends a text by itself."""
    kind, changes = MODELS[name]
    model = build(kind, **changes)
    model.generation_config.eos_token_id = None
    for path, parameter in model.named_parameters():
        if ".shift." in path or path.endswith("sinks"):
            nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """What `generate` writes greedily."""
    ids = torch.tensor([list(prompt)])
    written = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return list(written[0, len(prompt) :].tolist())


def greedy(prompt: Sequence[int], tokens: int, **settings: Any) -> Request:
    """A request of likeliest tokens."""
    own = {name: settings.pop(name) for name in ("packs", "deadline", "trace") if name in settings}
    return Request(prompt=tuple(prompt), sampling=SamplingParams(max_tokens=tokens, temperature=0, **settings), **own)


def tokens_of(events: Handle | Sequence[Event]) -> list[int]:
    """The tokens of events."""
    return [event.token_id for event in events if event.token_id is not None]


class Gate:
    """Holds a model at its next forward pass until it is opened."""

    def __init__(self, model: nn.Module):
        self.reached, self._open = threading.Event(), threading.Event()
        self._hook = model.register_forward_pre_hook(self._stop)

    def _stop(self, *arguments: Any) -> None:
        self.reached.set()
        assert self._open.wait(10), "nobody has opened the gate"

    def open(self) -> None:
        """Let it pass, now and later."""
        self._hook.remove()
        self._open.set()


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines, and closes them."""
    made: list[Engine] = []

    def new(model: PreTrainedModel, tokenizer: Any = None, **settings: Any) -> Engine:
        made.append(Engine(model, tokenizer or Letters(), **settings))
        return made[-1]

    yield new
    for each in made:
        each.close()
