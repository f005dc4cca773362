"""Generate completions of many prompts with continuous batching."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tjx_eval.load_model import TrainedModel
from tjx_eval.serving.engine import Engine, GenerationRequest, Token
from tjx_nn.generation.batch_sampling import SequenceOptions
from tjx_trainer.run_reader import TextStream


@dataclass(frozen=True)
class BatchRequest:
    """One prompt; see `tjx_eval.serving.engine.GenerationRequest` for the first three fields."""

    prompt: list[int]
    max_new_tokens: int
    options: SequenceOptions
    stops: list[str]


def complete_all(model: TrainedModel, requests: Sequence[BatchRequest], *, slots: int) -> list[str]:
    """Return the text of each completion, up to a stop text or the end of the document.

    Raises
    ------
    RuntimeError
        If the engine fails.
    """
    engine = Engine(model.gpt, model.params, slots=slots, max_waiting=len(requests))
    completions = [_Completion(model, request) for request in requests]
    queued = [
        GenerationRequest(
            each.prompt, each.max_new_tokens, each.options, completion.on_token, completion.on_end
        )
        for each, completion in zip(requests, completions, strict=True)
    ]
    engine.start()
    try:
        engine.submit(queued)
        for completion in completions:
            completion.ended.wait()
    finally:
        engine.stop(0.0)
        engine.join()
    if errors := [each.error for each in completions if each.error is not None]:
        raise RuntimeError(errors[0])
    return [each.text for each in completions]


class _Completion:
    """Text of one completion; updated by the engine's thread."""

    def __init__(self, model: TrainedModel, request: BatchRequest) -> None:
        self._stream = TextStream(model.tokenizer, request.stops, ends_with_document=True)
        self.text = ""
        self.error: str | None = None
        self.ended = threading.Event()

    def on_token(self, token: Token) -> bool:
        self.text += self._stream.push(token.id)
        return not self._stream.stopped

    def on_end(self, error: str | None) -> None:
        self.text += self._stream.close()
        self.error = error
        self.ended.set()
