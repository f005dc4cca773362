"""Continuations of a prompt while they are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Unpack

import jax
import numpy as np

import tjx_nn
from tjx_eval.load_model import TrainedModel
from tjx_trainer.tasks.sampling import SamplingParams, generation_inputs
from tjx_trainer.tasks.text_stream import TextStream


@dataclass
class Continuation:
    """One continuation, so far.

    Attributes
    ----------
    text : str
        What is certain of its text.
    tokens : list of int
        Its tokens, with those of a stop text.
    finish_reason : str or None
        "stop" (a stop text), "length", or None while it is written.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None = None


class Writing:
    """Writes continuations of one prompt; iterate to see the first one's text as it comes.

    Parameters
    ----------
    model : TrainedModel
        What writes.
    prompt : sequence of int
        Tokens to go on from.
    stops : sequence of str
        Texts that end a continuation.
    ends_with_document : bool
        Whether the end of a document ends it too.
    **choice
        As for `tjx_trainer.tasks.sampling.continue_prompt`.

    Attributes
    ----------
    continuations : list of Continuation
        All of them; complete when the iteration has ended. What was written when it is left early
        stays.

    Beyond the model's longest sequence the window slides: each further token is predicted from the
    last ``max_seq_len - 1`` ones, which are read anew.

    Raises
    ------
    ValueError
        If the options do not fit the model.
    """

    def __init__(
        self,
        model: TrainedModel,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        ends_with_document: bool = False,
        **choice: Unpack[SamplingParams],
    ) -> None:
        self._model, self._prompt = model.gpt, list(prompt)
        self._new, longest = choice["max_new_tokens"], model.gpt.max_seq_len
        first = self._prompt[-(longest - 1) :]
        choice["max_new_tokens"] = min(self._new, longest - len(first))
        inputs = generation_inputs(model.gpt, first, **choice)
        # Over several devices each would do the same: one is as fast.
        self._params = jax.device_put(model.params, jax.local_devices()[0])
        self._columns = tjx_nn.stream(model.gpt, self._params, **inputs)
        self._inputs, samples = inputs, len(inputs["prompt"])
        self._streams = [
            TextStream(model.tokenizer, stops, ends_with_document=ends_with_document)
            for _ in range(samples)
        ]
        self.continuations = [Continuation("", []) for _ in range(samples)]

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of the first continuation's text."""
        for column in chain(self._columns, self._slide()):
            pieces = [self._take(row, token) for row, token in enumerate(column.tolist())]
            if pieces[0]:
                yield pieces[0]
            if all(stream.stopped for stream in self._streams):
                break
        rest = [self._end(row) for row in range(len(self._streams))]
        if rest[0]:
            yield rest[0]

    def _slide(self) -> Iterator[np.ndarray]:
        """Yield further tokens [samples], each after as much as fits of what is before it."""
        options = dict(self._inputs)
        width, key = self._model.max_seq_len - 1, options.pop("key")
        for number in range(options["max_new_tokens"], self._new):
            prompts = np.zeros((len(self.continuations), width), np.int32)
            lengths = np.zeros(len(prompts), np.int32)
            for row, each in enumerate(self.continuations):
                window = [*self._prompt, *each.tokens][-width:]
                prompts[row, : len(window)], lengths[row] = window, len(window)
            options |= {"prompt": prompts, "prompt_lengths": lengths, "max_new_tokens": 1}
            folded = jax.jit(jax.random.fold_in)(key, jax.device_put(np.uint32(number)))
            tokens = tjx_nn.generate(self._model, self._params, key=folded, **options)
            yield jax.device_get(tokens)[:, 0]

    def _take(self, row: int, token: int) -> str:
        found, stream = self.continuations[row], self._streams[row]
        if stream.stopped:
            return ""
        found.tokens.append(token)
        piece = stream.push(token)
        found.text += piece
        return piece

    def _end(self, row: int) -> str:
        found, stream = self.continuations[row], self._streams[row]
        piece = stream.close()
        found.text += piece
        found.finish_reason = "stop" if stream.stopped else "length"
        return piece
