"""What a caller may want to tell from a mistake: prepared data that cannot be read as they were."""


class DataError(ValueError):
    """A file of prepared data is missing, unreadable, truncated or damaged; the message names it.

    What was asked for was right, and may be again when the file is back.
    """
