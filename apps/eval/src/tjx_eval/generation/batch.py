"""Continuations of many prompts, written in slots by the server's engine."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tjx_eval.load_model import TrainedModel
from tjx_eval.serving.engine import Engine, GenerationRequest, Token
from tjx_nn.generation.continuous_batching import SequenceOptions
from tjx_trainer.tasks.text_stream import TextStream


@dataclass(frozen=True)
class Task:
    """One text to write; see `tjx_eval.serving.engine.Order`, and `TextStream` of the stops."""

    prompt: list[int]
    max_new_tokens: int
    options: SequenceOptions
    stops: list[str]


def write_all(model: TrainedModel, tasks: Sequence[Task], *, slots: int) -> list[str]:
    """Return the text of each continuation, up to its stop text or the end of the document.

    Raises
    ------
    RuntimeError
        If the engine failed.
    """
    engine = Engine(model.gpt, model.params, slots=slots, most_waiting=len(tasks))
    written = [_Written(model, task) for task in tasks]
    orders = [
        GenerationRequest(task.prompt, task.max_new_tokens, task.options, each.take, each.end)
        for task, each in zip(tasks, written, strict=True)
    ]
    engine.start()
    try:
        engine.submit(orders)
        for each in written:
            each.over.wait()
    finally:
        engine.stop(0.0)
        engine.join()
    if failed := [each.reason for each in written if each.reason is not None]:
        raise RuntimeError(failed[0])
    return [each.text for each in written]


class _Written:
    """The text of one continuation, as it grows on the engine's thread."""

    def __init__(self, model: TrainedModel, task: Task) -> None:
        self._stream = TextStream(model.tokenizer, task.stops, ends_with_document=True)
        self.text = ""
        self.reason: str | None = None
        self.over = threading.Event()

    def take(self, token: Token) -> bool:
        self.text += self._stream.push(token.id)
        return not self._stream.stopped

    def end(self, reason: str | None) -> None:
        self.text += self._stream.close()
        self.reason = reason
        self.over.set()
