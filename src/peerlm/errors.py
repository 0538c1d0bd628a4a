"""What ends a command early, what it warns of, and how much a message repeats."""

from collections.abc import Iterable

MOST_CHARACTERS = 2000
"""Longest message of a `UserError`; a longer one loses its middle."""


class UserError(ValueError):
    """A mistake the user can fix: one sentence with what was wrong, the value, and the fix.

    The command line prints the sentence and exits with code 2; library users catch it as a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, MOST_CHARACTERS))


class PeerlmWarning(UserWarning):
    """A result is given, but there is something about it that the user should know: one sentence.

    The command line prints the sentence on stderr.
    """


class TrainingStopped(Exception):  # noqa: N818  # an outcome, not a mistake: the run is safe
    """Training ended early and left its last good state on the disk.

    The message is one sentence: what happened, where the state is, how to resume. `exit_code` is for the
    process: 3 when the loss or a gradient was not finite, 128 plus the signal's number when told to stop
    (143 for SIGTERM), 75 when another of the processes that train together was lost.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.resume: str | None = None
        """What to type to resume, where that is known and shorter than the command that was stopped."""

    @property
    def resumes(self) -> bool:
        """Whether the same command may succeed when the run is resumed."""
        return self.exit_code > 128 or self.exit_code == RankLost.exit_code


class RankLost(Exception):  # noqa: N818  # an outcome, not a mistake
    """Another process of those that train together has failed or does not answer; the message says what is known."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the same command may succeed when it is run again."""


def check_seed(seed: int) -> None:
    """Raise a UserError where torch takes no such seed."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must fit into 64 bits")


def shortened(text: str, most: int = 200) -> str:
    """The text, or its beginning and its end where it has more than `most` characters."""
    if len(text) <= most:
        return text
    ending = most // 3
    return f"{text[: most - ending - 5]} ... {text[-ending:]}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """The names with commas between them: the first `most`, then how many more there are; "none" without any.

    Where one of them has a comma of its own, all are in quotes.
    """
    words = [shortened(str(name)) for name in names]
    if any("," in word for word in words):
        words = [repr(word) for word in words]
    if len(words) > most:
        words[most:] = [f"and {len(words) - most:,} more"]
    return ", ".join(words) or "none"
