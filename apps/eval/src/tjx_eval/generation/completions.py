"""Stream completions of one prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Unpack

import jax
import numpy as np

import tjx_nn
from tjx_eval.load_model import TrainedModel
from tjx_trainer.run_reader import SamplingParams, TextStream, generation_inputs


@dataclass
class Completion:
    """One completion, possibly incomplete.

    Attributes
    ----------
    text : str
        Text so far, without a possible beginning of a stop text.
    tokens : list of int
        Its tokens, including those of a stop text.
    finish_reason : str or None
        "stop" (a stop text), "length", or None while it is being generated.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None = None


class CompletionStream:
    """Generate completions of one prompt; iterating yields the text of the first one.

    Beyond `max_seq_len` the context window slides: each further token is predicted from the last
    ``max_seq_len - 1`` tokens, without a KV cache.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    prompt : sequence of int
        Token ids.
    stops : sequence of str
        Stop texts.
    stop_at_eot : bool
        Whether an end-of-text token ends a completion too.
    **params
        Sampling parameters.

    Attributes
    ----------
    completions : list of Completion
        All completions; complete after the iteration. If the iteration is left early, the text so
        far is kept.

    Raises
    ------
    ValueError
        If a sampling parameter is out of range.
    """

    def __init__(
        self,
        model: TrainedModel,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        stop_at_eot: bool = False,
        **params: Unpack[SamplingParams],
    ) -> None:
        self._model, self._prompt = model.gpt, list(prompt)
        self._max_new, longest = params["max_new_tokens"], model.gpt.max_seq_len
        context = self._prompt[-(longest - 1) :]
        params["max_new_tokens"] = min(self._max_new, longest - len(context))
        inputs = generation_inputs(model.gpt, context, **params)
        # Generation is not sharded: with several devices, each would compute the same.
        self._params = jax.device_put(model.params, jax.local_devices()[0])
        self._columns = tjx_nn.stream(model.gpt, self._params, **inputs)
        self._inputs, samples = inputs, len(inputs["prompt"])
        self._streams = [
            TextStream(model.tokenizer, stops, ends_with_document=stop_at_eot)
            for _ in range(samples)
        ]
        self.completions = [Completion("", []) for _ in range(samples)]

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of the first completion's text."""
        for column in chain(self._columns, self._sliding_window()):
            pieces = [self._push(row, token) for row, token in enumerate(column.tolist())]
            if pieces[0]:
                yield pieces[0]
            if all(stream.stopped for stream in self._streams):
                break
        rest = [self._close(row) for row in range(len(self._streams))]
        if rest[0]:
            yield rest[0]

    def _sliding_window(self) -> Iterator[np.ndarray]:
        """Yield tokens [samples] beyond `max_seq_len`, each from the last tokens before it."""
        options = dict(self._inputs)
        width, key = self._model.max_seq_len - 1, options.pop("key")
        for number in range(options["max_new_tokens"], self._max_new):
            prompts = np.zeros((len(self.completions), width), np.int32)
            lengths = np.zeros(len(prompts), np.int32)
            for row, each in enumerate(self.completions):
                window = [*self._prompt, *each.tokens][-width:]
                prompts[row, : len(window)], lengths[row] = window, len(window)
            options |= {"prompt": prompts, "prompt_lengths": lengths, "max_new_tokens": 1}
            folded = jax.jit(jax.random.fold_in)(key, jax.device_put(np.uint32(number)))
            tokens = tjx_nn.generate(self._model, self._params, key=folded, **options)
            yield jax.device_get(tokens)[:, 0]

    def _push(self, row: int, token: int) -> str:
        completion, stream = self.completions[row], self._streams[row]
        if stream.stopped:
            return ""
        completion.tokens.append(token)
        piece = stream.push(token)
        completion.text += piece
        return piece

    def _close(self, row: int) -> str:
        completion, stream = self.completions[row], self._streams[row]
        piece = stream.close()
        completion.text += piece
        completion.finish_reason = "stop" if stream.stopped else "length"
        return piece
