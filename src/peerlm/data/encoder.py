"""Text to token ids, long documents in pieces, with an account of what the tokenizer loses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peerlm.data.text_loss import TextLoss
from peerlm.data.tokenizer import encoder
from peerlm.errors import PeerlmWarning

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TextEncoder:
    """Encodes text without marks, and counts in `loss` what does not come back.

    Args:
        tokenizer: whose engine is copied; see `tokenizer.encoder`.

    Attributes:
        first: the engine for the beginning of a document.
        rest: the engine for text that continues a document: it puts no space before it.
        loss: of all that `account` was given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.first = encoder(tokenizer)
        state = json.loads(self.first.to_str())
        self._unknown = _unknown_id(self.first, state["model"])
        if state["decoder"] is None:
            state = _with_decoder(self.first, state)
        self.rest = _continuing(self.first, state)
        self.loss = TextLoss()

    def encode(self, texts: Sequence[str], continues: Sequence[bool]) -> list[list[int]]:
        """Token ids of each text; `continues` says which of them continue a document."""
        found: list[list[int]] = [[] for _ in texts]
        for engine, places in self._by_engine(continues):
            encodings = engine.encode_batch_fast([texts[place] for place in places], add_special_tokens=False)
            for place, encoding in zip(places, encodings, strict=True):
                found[place] = encoding.ids
        return found

    def account(self, texts: Sequence[str], ids: Sequence[list[int]], continues: Sequence[bool]) -> list[int]:
        """Compare texts with what their token ids decode to; returns the UTF-8 bytes of each that were dropped."""
        dropped = [0] * len(texts)
        for engine, places in self._by_engine(continues):
            decoded = engine.decode_batch([ids[place] for place in places], skip_special_tokens=True)
            for place, back in zip(places, decoded, strict=True):
                text = texts[place]
                if text in (back, f" {back}"):  # decoders take a space off that many tokenizers put before a text
                    self.loss.read += len(text.encode())
                    continue
                unknown = self._unknown in ids[place]
                if unknown:
                    back = engine.decode([token for token in ids[place] if token != self._unknown])
                normalizer = engine.normalizer
                normalized = normalizer.normalize_str(text) if normalizer else text
                dropped[place] = self.loss.add(text, back, normalized=normalized, unknown=unknown)
        return dropped

    def warn(self, what: str) -> None:
        """Warn (`PeerlmWarning`) of what was lost of a text called `what`."""
        warn_of_loss(self.loss, what)

    def _by_engine(self, continues: Sequence[bool]) -> list[tuple[Tokenizer, list[int]]]:
        """The engines, and the places of the texts that are for them."""
        if self.rest is self.first:
            return [(self.first, list(range(len(continues))))]
        firsts = [place for place, later in enumerate(continues) if not later]
        rests = [place for place, later in enumerate(continues) if later]
        return [(engine, places) for engine, places in ((self.first, firsts), (self.rest, rests)) if places]


def warn_of_loss(loss: TextLoss, what: str) -> None:
    """Warn (`PeerlmWarning`) of what a tokenizer lost of a text called `what`, once for each reason."""
    for sentence in loss.sentences(what):
        warnings.warn(sentence, PeerlmWarning, stacklevel=3)


def _continuing(engine: Tokenizer, state: dict[str, Any]) -> Tokenizer:
    """The engine for text within a document: what it would put before a text, or take from its beginning, stays off."""
    from tokenizers import Tokenizer

    changed = {part: _without_prefix(state[part]) for part in ("normalizer", "pre_tokenizer", "decoder")}
    if all(changed[part] == state[part] for part in changed):
        return engine
    rest = Tokenizer.from_str(json.dumps(state | changed))
    rest.encode_special_tokens = True
    return rest


def _without_prefix(part: Any) -> Any:
    """A part of a tokenizer's JSON that adds no space before a text and strips none; None where nothing is left."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            changed[name] = [kept for each in part[name] if (kept := _without_prefix(each)) is not None]
    if part["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        changed["add_prefix_space"] = False
    if part["type"] == "Strip":
        changed |= {"start": 0} if "start" in part else {"strip_left": False}
    return changed


def _unknown_id(engine: Tokenizer, model: dict[str, Any]) -> int | None:
    """The token that stands for all that is unknown; None where there is none."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    found: int | None = None if token is None else engine.token_to_id(token)
    return found


def _with_decoder(engine: Tokenizer, state: dict[str, Any]) -> dict[str, Any]:
    """Give an engine without a decoder the one that undoes its pre-tokenizer; returns its state."""
    from tokenizers import decoders

    written = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    for name, decoder in (("ByteLevel", decoders.ByteLevel), ("Metaspace", decoders.Metaspace)):
        if f'"type": "{name}"' in written:
            engine.decoder = decoder()
            return dict(json.loads(engine.to_str()))
    return state
