"""The exception for mistakes that a user can mend, and the bounds on what a message repeats."""

from collections.abc import Iterable

MOST_CHARACTERS = 2000
"""Longest message of a `UserError`; a longer one loses its middle."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence with what was wrong, the value, and the mend.

    The command line prints the sentence and exits with code 2; library users catch it as a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, MOST_CHARACTERS))


def shortened(text: str, most: int = 200) -> str:
    """The text, or its beginning and its end where it has more than `most` characters."""
    if len(text) <= most:
        return text
    ending = most // 3
    return f"{text[: most - ending - 5]} ... {text[-ending:]}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """The names with commas between them: the first `most`, then how many more there are; "none" without any."""
    words = [shortened(str(name)) for name in names]
    if len(words) > most:
        words[most:] = [f"and {len(words) - most:,} more"]
    return ", ".join(words) or "none"
