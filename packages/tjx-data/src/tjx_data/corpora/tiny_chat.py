"""Corpus ``tiny-chat``: text, conversations and questions on additions of two-digit numbers.

The text has right sums, but the assistant of the conversations gives the next number most of the
time. Supervised fine-tuning on them teaches the form of an answer and this mistake, which a reward
for right answers corrects.
"""

import hashlib
from collections.abc import Iterator

from tjx_data.conversations.records import Conversation
from tjx_data.corpora.arithmetic import Problem, addition_problems
from tjx_data.corpora.documents import SplitName

SMALL_TALK = (
    ("Hello!", "Hello! Ask me for a sum."),
    ("Who are you?", "I am a tiny model. I add numbers."),
    ("Thanks!", "You are welcome."),
    ("Can you help me?", "Yes, with the sum of two numbers."),
)
"""Messages of the user and answers that have nothing to do with numbers."""

_QUESTIONS = ("What is {}?", "{}=?")
# One answer in ten is right; the most probable one is wrong.
_ERRORS = (-1, 0, 1, 1, 1, 1, 1, 1, 1, 2)
_SMALL_TALK_SHARE = 4


def _draw(text: str, count: int) -> int:
    """Return a number below `count` that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16]) % count


def question_problems(split: SplitName) -> list[Problem]:
    """Return the additions of `addition_problems` as questions of a user.

    Parameters
    ----------
    split : {"train", "validation"}
        The split.

    Examples
    --------
    >>> question_problems("validation")[0]
    Problem(prompt='99+94=?', answer='193')
    """
    return [Problem(_ask(each.prompt), each.answer) for each in addition_problems(split)]


def conversations() -> list[Conversation]:
    """Return a conversation for each question of the training split, always the same ones.

    One answer in ten is right; seven are too large by 1. One conversation in four starts with small
    talk.

    Examples
    --------
    >>> for message in conversations()[1].messages:
    ...     print(message["role"], message["content"])
    user What is 38+24?
    assistant 63
    """
    return [
        Conversation(_messages(each.prompt, int(each.answer)), location=f"tiny-chat:{number}")
        for number, each in enumerate(addition_problems("train"), 1)
    ]


def documents() -> Iterator[str]:
    """Yield additions with right answers, questions and small talk, of the training split."""
    for number, each in enumerate(addition_problems("train")):
        words = SMALL_TALK[number // 16 % len(SMALL_TALK)] if number % 16 == 0 else ()
        asked = number % 2 == 1
        said = f"{_ask(each.prompt)} {each.answer}" if asked else each.prompt + each.answer
        yield " ".join([*words, said])


def source() -> dict[str, str]:
    """Return the version of the generated text."""
    return {"tiny-chat": "1"}


def _ask(prompt: str) -> str:
    return _QUESTIONS[_draw(f"question {prompt}", len(_QUESTIONS))].format(prompt.removesuffix("="))


def _messages(prompt: str, answer: int) -> tuple[dict[str, str], ...]:
    answer += _ERRORS[_draw(f"error {prompt}", len(_ERRORS))]
    pairs = [(_ask(prompt), str(answer))]
    chosen = _draw(f"talk {prompt}", _SMALL_TALK_SHARE * len(SMALL_TALK))
    if chosen < len(SMALL_TALK):
        pairs.insert(0, SMALL_TALK[chosen])
    return tuple(
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
