"""The exception for mistakes that the user can correct."""


class UserError(ValueError):
    """A mistake in a config, a command line or the data. Scripts print its one line and exit with code 2.

    The message names the field, its value, what is allowed and what to do.
    """
