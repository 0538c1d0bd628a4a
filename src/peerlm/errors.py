"""The one exception for mistakes that a user can mend, and the one warning."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence with what was wrong, the value, and the mend.

    The command line prints the sentence and exits with code 2; library users catch it as a `ValueError`.
    """


class PeerlmWarning(UserWarning):
    """A result is given, but there is something about it that the user should know: one sentence.

    The command line prints the sentence on stderr.
    """
