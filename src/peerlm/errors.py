"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence with what was wrong, the value, and the mend.

    The command line prints the sentence and exits with code 2; library users catch it as a `ValueError`.
    """
