"""Interactive conversation on the terminal."""

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from tjx_data import ChatTemplate, encode_chat_prompt
from tjx_eval.errors import EvalError
from tjx_eval.generation.completions import CompletionStream
from tjx_eval.load_model import TrainedModel
from tjx_trainer.run_reader import SamplingParams


def chat(
    model: TrainedModel,
    prompt: str,
    *,
    stops: Sequence[str],
    params: SamplingParams,
    template: ChatTemplate | None = None,
    read_line: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
) -> int:
    """Converse with a model until end of input (Ctrl-D).

    A base model has no roles: the user's line, a newline and the answer are appended to one text,
    which is the context of the next answer. With a template, lines and answers are messages. Ctrl-C
    ends an answer; its text so far is kept.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    prompt : str
        Text before the first line, with a template the system message; may be empty.
    stops : sequence of str
        Stop texts of an answer; an end-of-text token ends it too.
    params : SamplingParams
        Sampling parameters; the seed is incremented for each answer.
    template : ChatTemplate, optional
        Chat template; special tokens of the tokenizer end an answer.
    read_line : callable
        Reads a line after showing a prompt.
    write : callable, optional
        Shows pieces of answers and notes; by default on standard output.

    Returns
    -------
    int
        Number of turns.

    Raises
    ------
    EvalError
        If `max_new_tokens` leaves no room for a question.
    """
    write = _print if write is None else write
    with suppress(ImportError):
        import readline  # noqa: F401  enables line editing and history
    context: ChatContext | TemplateContext
    if template is None:
        context = ChatContext(model, params["max_new_tokens"], prompt)
    else:
        context = TemplateContext(model, params["max_new_tokens"], prompt, template)
        stops = [*stops, *model.tokenizer.special_tokens]
    turns = 0
    while True:
        try:
            line = read_line("> ")
        except EOFError:
            write("\n")
            return turns
        except KeyboardInterrupt:
            write("\n(Ctrl-D exits)\n")
            continue
        try:
            note = context.add(line + "\n")
        except ValueError as error:
            write(f"({error})\n")
            continue
        if note:
            write(f"({note})\n")
        turn: SamplingParams = {**params, "seed": params["seed"] + turns}
        context.add(_answer(model, context.tokens, stops, turn, write), by_model=True)
        turns += 1


def _answer(
    model: TrainedModel,
    tokens: Sequence[int],
    stops: Sequence[str],
    params: SamplingParams,
    write: Callable[[str], None],
) -> str:
    """Stream an answer; return its text, terminated by a newline."""
    stream = CompletionStream(model, tokens, stops=stops, stop_at_eot=True, **params)
    try:
        for piece in stream:
            write(piece)
    except KeyboardInterrupt:
        write(" (stopped)")
    text = stream.completions[0].text
    if not text.endswith("\n"):
        text += "\n"
    write("\n")
    return text


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class ChatContext:
    """The newest tokens of a conversation that leave room for an answer.

    Parameters
    ----------
    model : TrainedModel
        Its `max_seq_len` limits the context.
    room : int
        Tokens reserved for an answer.
    prompt : str
        Initial text; may be empty.

    Attributes
    ----------
    tokens : list of int
        Input of the next answer.
    """

    def __init__(self, model: TrainedModel, room: int, prompt: str) -> None:
        self._tokenizer = model.tokenizer
        eot = self._tokenizer.eot_id
        self._prefix = [] if eot is None else [eot]
        self._max_tokens = _room_for_question(model, room) - len(self._prefix)
        encoded = self._tokenizer.encode_prompt(prompt) if prompt else []
        self._history = encoded[len(self._prefix) :]

    @property
    def tokens(self) -> list[int]:
        """End-of-text token, if the tokenizer has one, and the conversation."""
        return self._prefix + self._history

    def add(self, text: str, *, by_model: bool = False) -> str:
        """Append a text; return a note if old tokens were dropped, else "".

        Text by the model may contain names of special tokens, which are encoded as such.
        """
        special: Collection[str] = self._tokenizer.special_tokens if by_model else ()
        self._history += self._tokenizer.encode(text, allowed_special=special)
        excess = len(self._history) - self._max_tokens
        if excess <= 0:
            return ""
        del self._history[:excess]
        return f"dropped the oldest {excess} tokens; the context has {self._max_tokens}"


class TemplateContext:
    """The newest messages of a conversation that leave room for an answer.

    Parameters
    ----------
    model : TrainedModel
        Its `max_seq_len` limits the context.
    room : int
        Tokens reserved for an answer.
    system : str
        The system message; may be empty.
    template : ChatTemplate
        The chat template.
    """

    def __init__(self, model: TrainedModel, room: int, system: str, template: ChatTemplate) -> None:
        self._tokenizer, self._template = model.tokenizer, template
        self._max_tokens = _room_for_question(model, room)
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []

    @property
    def tokens(self) -> list[int]:
        """The messages and the start of an answer."""
        messages = self._system + self._messages
        return encode_chat_prompt(self._template, self._tokenizer, messages)

    def add(self, text: str, *, by_model: bool = False) -> str:
        """Append a message; return a note if old messages were dropped, else "".

        Raises
        ------
        ValueError
            If the message is too long, contains a special token, or the template rejects it.
        """
        role = "assistant" if by_model else "user"
        before = list(self._messages)
        self._messages.append({"role": role, "content": text.strip()})
        if by_model:
            return ""
        try:
            while (excess := len(self.tokens) - self._max_tokens) > 0:
                if len(self._messages) < 3:
                    raise ValueError(f"the message has {excess} tokens too many")
                del self._messages[:2]
        except ValueError:
            self._messages = before
            raise
        dropped = len(before) + 1 - len(self._messages)
        return f"dropped the oldest {dropped} messages" if dropped else ""


def _room_for_question(model: TrainedModel, room: int) -> int:
    """Return the tokens that an answer of `room` tokens leaves; raise EvalError if none."""
    left = model.gpt.max_seq_len - room
    if left < 2:
        raise EvalError(
            f"--max_new_tokens: got {room}, which leaves no room for a question; the model's "
            f"max_seq_len is {model.gpt.max_seq_len}; give {max(model.gpt.max_seq_len // 2, 1)}"
        )
    return left
