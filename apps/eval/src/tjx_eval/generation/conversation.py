"""A conversation on the terminal: what was said is the context of what is said next."""

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from tjx_eval.errors import EvalError
from tjx_eval.generation.completions import Writing
from tjx_eval.load_model import TrainedModel
from tjx_trainer.tasks.sampling import SamplingParams, encode_prompt


def converse(
    model: TrainedModel,
    prompt: str,
    *,
    stops: Sequence[str],
    choice: SamplingParams,
    ask: Callable[[str], str] = input,
    say: Callable[[str], None] | None = None,
) -> int:
    """Let a person and the model write in turns, until end of input (Ctrl-D).

    A base model knows no roles: the person's line, a line end, and what the model writes follow
    each other as one text. Ctrl-C ends what the model is writing; what it wrote stays said.

    Parameters
    ----------
    model : TrainedModel
        What answers.
    prompt : str
        Text that the conversation begins with; empty for none.
    stops : sequence of str
        Texts that end an answer; so does the end of a document.
    choice : Choice
        How answers are written; each turn has a seed of its own, counted from the given one.
    ask : callable
        Reads a line, shown the given prompt.
    say : callable, optional
        Shows answers and notes, piece by piece; on standard output by default.

    Returns
    -------
    int
        The number of turns.

    Raises
    ------
    RunError
        If an answer of this length leaves no room for a question.
    """
    say = _print if say is None else say
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and called back
    context = Context(model, choice["max_new_tokens"], prompt)
    turns = 0
    while True:
        try:
            line = ask("> ")
        except EOFError:
            say("\n")
            return turns
        except KeyboardInterrupt:
            say("\n(Ctrl-D leaves)\n")
            continue
        try:
            dropped = context.add(line + "\n")
        except ValueError as error:
            say(f"({error})\n")
            continue
        if dropped:
            say(f"({dropped})\n")
        turn: SamplingParams = {**choice, "seed": choice["seed"] + turns}
        context.add(_answer(model, context.tokens, stops, turn, say), by_model=True)
        turns += 1


def _answer(
    model: TrainedModel,
    tokens: Sequence[int],
    stops: Sequence[str],
    choice: SamplingParams,
    say: Callable[[str], None],
) -> str:
    """Write an answer as it comes; return its text, which ends a line."""
    writing = Writing(model, tokens, stops=stops, ends_with_document=True, **choice)
    try:
        for piece in writing:
            say(piece)
    except KeyboardInterrupt:
        say(" (stopped)")
    text = writing.continuations[0].text
    if not text.endswith("\n"):
        text += "\n"
    say("\n")
    return text


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Context:
    """The tokens of a conversation, as many of the newest as leave room for an answer.

    Parameters
    ----------
    model : TrainedModel
        Whose longest sequence bounds it.
    room : int
        Tokens of an answer.
    prompt : str
        What it begins with; empty is nothing.

    Attributes
    ----------
    tokens : list of int
        What the model reads next.
    """

    def __init__(self, model: TrainedModel, room: int, prompt: str) -> None:
        self._tokenizer = model.tokenizer
        start = self._tokenizer.eot_id
        self._start = [] if start is None else [start]
        self._most = model.gpt.max_seq_len - room - len(self._start)
        if self._most < 1:
            raise EvalError(
                f"--max_new_tokens {room} leaves no room for a question: the model's longest "
                f"sequence is {model.gpt.max_seq_len}; give {max(model.gpt.max_seq_len // 2, 1)}"
            )
        self._said = encode_prompt(self._tokenizer, prompt)[len(self._start) :] if prompt else []

    @property
    def tokens(self) -> list[int]:
        """The beginning of a document, and what was said."""
        return self._start + self._said

    def add(self, text: str, *, by_model: bool = False) -> str:
        """Add what was said; return a note of what had to be dropped, or nothing.

        The model may write special tokens, which stand in the text by their names.
        """
        special: Collection[str] = self._tokenizer.special_tokens if by_model else ()
        self._said += self._tokenizer.encode(text, allowed_special=special)
        excess = len(self._said) - self._most
        if excess <= 0:
            return ""
        del self._said[:excess]
        return f"the oldest {excess} tokens were dropped: the model sees {self._most} and an answer"
