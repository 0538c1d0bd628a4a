"""Text of tokens that come one at a time is the decoded text, in whole characters, up to a stop string."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from peerlm.serve.text import TextStream

OPTIONS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def streamed(tokenizer: Any, prompt: list[int], ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """The parts in which a text comes, to its end or a stop string."""
    stream = TextStream(tokenizer, prompt, stops)
    parts = []
    for token in ids:
        text, stop = stream.add(token)
        parts.append(text)
        if stop is not None:
            return parts
    return [*parts, stream.finish()[0]]


@pytest.mark.parametrize("kind", ["bytes", "spaces", "llama"])
@pytest.mark.parametrize("seed", range(3))
def test_parts_joined_are_the_decoded_text(kind: str, seed: int, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(kind, byte_fallback=kind == "llama")
    choice = random.Random(seed)
    words = [*["river", "lantern", "moss", "quiet", "copper", "ladder"], "h\u00e9 \u20ac 5", "\U0001f600"]
    text = " ".join(choice.choice(words if kind != "spaces" else words[:6]) for _ in range(12))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = choice.randrange(1, len(ids) - 1)
    while tokenizer.decode(ids[:cut], **OPTIONS).endswith("\ufffd"):
        cut -= 1
    parts = streamed(tokenizer, ids[:cut], ids[cut:])
    assert tokenizer.decode(ids[:cut], **OPTIONS) + "".join(parts) == tokenizer.decode(ids, **OPTIONS)
    assert not any("\ufffd" in part for part in parts)


def test_a_character_of_several_tokens_comes_whole(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer("a\U0001f600b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert streamed(tokenizer, [], ids) == ["a", "", "", "", "\U0001f600", "b", ""]
    assert "".join(streamed(tokenizer, [], ids[:3])) == "a\ufffd"


class Pieces:
    """A tokenizer of given pieces."""

    def __init__(self, *pieces: str):
        self._pieces = pieces

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self._pieces[token] for token in ids)


@pytest.mark.parametrize(
    ("pieces", "stops", "parts"),
    [
        (("one ", "END", " two"), ("END",), ["one ", ""]),
        (("one E", "N", "D two"), ("END",), ["one ", "", ""]),
        (("one E", "N", "S"), ("END",), ["one ", "", "ENS", ""]),
        (("aab", "aabaa", "b"), ("aabaab",), ["", ""]),
        (("x\n", "\n", "y"), ("\n\n", "zz"), ["x", ""]),
        (("abcd",), ("cd", "bc"), ["a"]),
        (("ends in E",), ("END",), ["ends in ", "E"]),
    ],
)
def test_stop_strings_end_a_text_across_tokens_and_never_show(
    pieces: tuple[str, ...], stops: tuple[str, ...], parts: list[str]
) -> None:
    assert streamed(Pieces(*pieces), [], list(range(len(pieces))), stops) == parts


def test_a_stop_string_counts_only_where_the_text_may_stop() -> None:
    stream = TextStream(Pieces("END", "a"), [], ["END"])
    assert stream.add(0, may_stop=False) == ("END", None)
    assert stream.add(1) == ("a", None)
    assert stream.add(0) == ("", "END")
