"""What a tokenizer loses of a text: characters that do not come back when its tokens are decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KINDS = ("dropped", "unknown", "altered", "spaces")
_SENTENCES = {
    "dropped": "the tokenizer has no token for {share} of {what}{examples} and leaves that out; bytes are counted "
    "without it",
    "unknown": "the tokenizer does not know {share} of {what}{examples} and writes one token for all that is unknown; "
    "bits per byte are too low for a comparison",
    "altered": "the tokenizer changes {share} of {what}{examples} to other characters; bits per byte are too low for a "
    "comparison",
    "spaces": "the tokenizer does not keep {share} of {what}, which is white space; bits per byte are too low for a "
    "comparison",
}


@dataclass(kw_only=True)
class TextLoss:
    """UTF-8 bytes that were read, and those of them that tokens do not stand for, by the reason."""

    read: int = 0
    """All bytes."""
    dropped: int = 0
    """No token stands for them."""
    unknown: int = 0
    """A token for what is unknown stands for them."""
    altered: int = 0
    """They come back as other characters: the normaliser's work, such as lower case."""
    spaces: int = 0
    """White space that does not come back."""
    examples: dict[str, Counter[str]] = field(default_factory=dict)
    """Characters of each kind, and how often they were lost."""

    def add(self, text: str, decoded: str, *, normalized: str, unknown: bool) -> int:
        """Count a text against what its tokens decode to; returns the bytes that were dropped.

        Characters are compared as a multiset: cheap, and right wherever characters vanish or change.

        Args:
            text: what was encoded.
            decoded: what came back, without tokens for what is unknown.
            normalized: the text after the tokenizer's normaliser.
            unknown: whether a token for what is unknown was among the tokens.
        """
        self.read += len(text.encode())
        if decoded == text:
            return 0
        given = Counter(text)
        lost = given - Counter(decoded)
        altered = given - Counter(normalized)
        dropped = 0
        for character, times in lost.items():
            if character.isspace():
                parts = {"spaces": times}
            else:
                changed = min(times, altered[character])
                parts = {"altered": changed, "unknown" if unknown else "dropped": times - changed}
            for kind, count in parts.items():
                if count:
                    num_bytes = count * len(character.encode())
                    setattr(self, kind, getattr(self, kind) + num_bytes)
                    self.examples.setdefault(kind, Counter())[character] += count
                    dropped += num_bytes if kind == "dropped" else 0
        return dropped

    def merge(self, other: TextLoss) -> None:
        """Add what another one counted, of text that comes later."""
        for name in ("read", *KINDS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, found in other.examples.items():
            self.examples.setdefault(kind, Counter()).update(found)

    @property
    def shares(self) -> dict[str, float]:
        """Lost bytes over those read, by reason; reasons without any are left out."""
        return {kind: getattr(self, kind) / self.read for kind in KINDS if getattr(self, kind)}

    def sentences(self, what: str) -> list[str]:
        """A sentence for each reason, about a text called `what`."""
        found = []
        for kind, share in self.shares.items():
            most = " ".join(map(repr, (character for character, _ in self.examples[kind].most_common(3))))
            found.append(_SENTENCES[kind].format(share=f"{100 * share:.3g}%", what=what, examples=f" (such as {most})"))
        return found
