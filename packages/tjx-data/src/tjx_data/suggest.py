"""The nearest right name, for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name nearest to the given one, or "".

    Examples
    --------
    >>> did_you_mean("pyton-docs", ["python-docs", "shakespeare"])
    "; did you mean 'python-docs'?"
    >>> did_you_mean("zzz", ["python-docs"])
    ''
    """
    nearest = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
