"""Verifiers that compare text: exact and numeric."""

import re
from decimal import Decimal

# A number has a bounded length, so that parsing a response takes linear time.
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d{1,40}(?:,\d{3}){0,12}(?:\.\d{1,40})?(?![\w.]*\d)")


def exact_match(response: str, answer: str) -> bool:
    """Return whether response and answer are equal, without surrounding white space."""
    return response.strip() == answer.strip()


def numeric_match(response: str, answer: str) -> bool:
    """Return whether the last number in a response equals the answer.

    Parameters
    ----------
    response : str
        Any text. Numbers may have a sign, groups of thousands and decimals; exponents are not read.
    answer : str
        A number.

    Raises
    ------
    ValueError
        If the answer is not a number.

    Examples
    --------
    >>> numeric_match("First 7, then 1,000.50.", "1000.5"), numeric_match("none", "3")
    (True, False)
    """
    expected = last_number(answer)
    if expected is None:
        raise ValueError(f"answer: got {answer[:50]!r}; expected a number; correct the data")
    return last_number(response) == expected


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
