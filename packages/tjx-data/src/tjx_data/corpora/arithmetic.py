"""Corpus ``arithmetic``: additions of two-digit numbers, with their sums as answers."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from tjx_data.corpora.documents import SplitName, assign_split

HELD_OUT_FRACTION = 0.1


class Problem(NamedTuple):
    """An addition: the prompt ``12+34=`` and the answer ``46``."""

    prompt: str
    answer: str


def addition_problems(split: SplitName) -> list[Problem]:
    """Return the additions of a split, in a fixed shuffled order.

    The 8100 additions of two numbers from 10 to 99 are divided by a hash of their prompt: about a
    tenth is for validation, and no split has a prompt of the other.

    Parameters
    ----------
    split : {"train", "validation"}
        The split.

    Examples
    --------
    >>> train, held_out = addition_problems("train"), addition_problems("validation")
    >>> len(train), len(held_out), set(train) & set(held_out)
    (7295, 805, set())
    """
    numbers = range(10, 100)
    problems = [Problem(f"{a}+{b}=", str(a + b)) for a in numbers for b in numbers]
    chosen = [each for each in problems if assign_split(each.prompt, HELD_OUT_FRACTION) == split]
    return sorted(chosen, key=lambda each: hashlib.sha256(each.prompt.encode()).digest()[8:])


def documents() -> Iterator[str]:
    """Yield the additions of the training split with their answers; held-out ones never occur."""
    for prompt, answer in addition_problems("train"):
        yield prompt + answer


def source() -> dict[str, str]:
    """Return the version of the additions and their order."""
    return {"additions": "1"}
