"""Log-likelihoods of continuations of contexts, as tasks of several choices compare them.

Array axes: B rows, T tokens in a row, D d_model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import tjx_nn
import tjx_parallel
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.score import ProgressCallback, no_progress
from tjx_eval.scoring.windows import Window, make_batch, plan_batches
from tjx_metrics import cross_entropy
from tjx_trainer.run_reader import model_layout

# Tokens of the context, and of the continuation to be scored.
Pair = tuple[list[int], list[int]]


class ContinuationScore(NamedTuple):
    """Score of a continuation.

    Attributes
    ----------
    log_likelihood : float
        Sum over its tokens, nats.
    greedy : bool
        Whether greedy decoding would produce it.
    """

    log_likelihood: float
    greedy: bool


class ContinuationScorer:
    """Score continuations in batches.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    batch_size : int
        Rows per batch over all devices; does not change results.

    Attributes
    ----------
    truncated : int
        Number of contexts that were truncated to their end, as they were too long.
    """

    def __init__(self, model: TrainedModel, *, batch_size: int) -> None:
        self._model = model
        devices = model.mesh.size
        self._batch_size = -(-batch_size // devices) * devices
        self._layout = model_layout(model.gpt, model.mesh)
        self._step = jax.jit(self._score_batch)
        self.truncated = 0

    def score(
        self, pairs: Sequence[Pair], on_progress: ProgressCallback = no_progress
    ) -> list[ContinuationScore]:
        """Score the continuation of each context.

        Parameters
        ----------
        pairs : sequence of (list of int, list of int)
            Tokens of each context, at least one, and of its continuation.
        on_progress : callable
            Called after each batch.

        Raises
        ------
        EvalError
            If a continuation is longer than the model's context.
        """
        longest = self._model.gpt.max_seq_len
        sequences = []
        for context, text in pairs:
            if len(text) > longest:
                raise EvalError(
                    f"the task scores a text of {len(text)} tokens at once; the model's "
                    f"max_seq_len is {longest}"
                )
            self.truncated += len(context) + len(text) > longest + 1
            sequences.append(np.asarray((context + text)[-(longest + 1) :], np.int32))
        windows = [
            Window(i, 0, len(sequence) - 1 - len(text), len(sequence) - 1)
            for i, (sequence, (_, text)) in enumerate(zip(sequences, pairs, strict=True))
        ]
        results = [ContinuationScore(0.0, True)] * len(windows)
        done, total = 0, sum(window.end for window in windows)
        for length, batch in plan_batches(windows, longest, self._batch_size):
            filled = make_batch(sequences, batch, self._batch_size, length)
            placed = tjx_parallel.shard_batch(self._model.mesh, filled)
            losses_BT, greedy_BT = jax.device_get(self._step(self._model.params, **placed))
            for window, losses_T, greedy_T in zip(batch, losses_BT, greedy_BT, strict=False):
                scored = slice(window.scored, window.end)
                log_likelihood = -float(losses_T[scored].sum(dtype=np.float64))
                results[window.sequence] = ContinuationScore(
                    log_likelihood, bool(greedy_T[scored].all())
                )
            done += sum(window.end for window in batch)
            on_progress(done, total)
        return results

    def _score_batch(
        self, params: Any, tokens: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss of each label [B, T], and whether it has the highest logit."""
        network = tjx_nn.bind(self._model.gpt, params, layout=self._layout)
        hidden_BTD = network.hidden(tokens)

        def score_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits_TV = network.logits(row[0])
            return cross_entropy(logits_TV, row[1]), logits_TV.argmax(-1) == row[1]

        # One row at a time, because the logits of all rows would not fit in memory.
        scores: tuple[jax.Array, jax.Array] = jax.lax.map(score_row, (hidden_BTD, labels))
        return scores


def encode_text(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Encode a text of a task with a method of its tokenizer.

    Raises
    ------
    EvalError
        If the tokenizer cannot represent it.
    """
    try:
        return encode(text)
    except ValueError as error:
        raise EvalError(f"a text of the task cannot be encoded: {error}") from error
