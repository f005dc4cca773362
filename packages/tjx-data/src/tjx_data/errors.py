"""Exceptions that callers handle differently from mistakes in arguments."""


class DataError(ValueError):
    """A file of a prepared set is missing, unreadable, truncated or damaged.

    The message names the file. The arguments of the call were valid: it can succeed after the file
    is restored.
    """
