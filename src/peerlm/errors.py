"""What ends a command early: a mistake that the user can fix, and a training run that stopped."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can fix: one sentence with what was wrong, the value, and the fix.

    The command line prints the sentence and exits with code 2; library users catch it as a `ValueError`.
    """


class TrainingStopped(Exception):  # noqa: N818  # an outcome, not a mistake: the run is safe
    """Training ended early and left its last good state on the disk.

    The message is one sentence: what happened, where the state is, how to resume. `exit_code` is for the
    process: 3 when the loss or a gradient was not finite, 128 plus the signal's number when told to stop
    (143 for SIGTERM).
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def quoted(names: Iterable[object]) -> str:
    """Names that users chose, in a message: each in quotes, since it may hold a comma; "none" where there are none."""
    return ", ".join(repr(str(name)) for name in names) or "none"
