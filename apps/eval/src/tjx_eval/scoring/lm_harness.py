"""Adapter of a decoder to lm-evaluation-harness: log-likelihoods and text generation.

Importing this module imports the harness, which takes seconds.

Array axes: B rows, T tokens in a row, D d_model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import tjx_nn
import tjx_parallel
from tjx_eval.errors import EvalError
from tjx_eval.generation.batch import BatchRequest, complete_all
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.windows import Window, make_batch, plan_batches
from tjx_metrics import cross_entropy
from tjx_trainer.run_reader import model_layout

# Tokens of the context, and of the continuation to be scored.
Pair = tuple[list[int], list[int]]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # untyped
    """A decoder as a model of lm-evaluation-harness.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    batch_size : int
        Rows per batch; does not change results.

    Attributes
    ----------
    notes : set of str
        Remarks on truncated contexts or continuations, for the user.
    """

    def __init__(self, model: TrainedModel, *, batch_size: int) -> None:
        super().__init__()
        self._model = model
        devices = model.mesh.size
        self._batch_size = -(-batch_size // devices) * devices
        self.notes: set[str] = set()
        self._layout = model_layout(model.gpt, model.mesh)
        self._step = jax.jit(self._score_batch)

    @property
    def eot_token_id(self) -> int:
        """Token before a text without context: end-of-text, or a newline if there is none."""
        return self._model.tokenizer.encode_prompt("")[0]

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request cache."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text without special tokens."""
        del add_special_tokens
        return _encode(self._model.tokenizer.encode, string)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts; each token is scored once."""
        del disable_tqdm
        longest = self._model.gpt.max_seq_len
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, longest, 1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score_pairs(pairs), strict=True):
            sums[owner] += log_likelihood
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score_pairs([(context, text) for _, context, text in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations, each up to its stop text."""
        del disable_tqdm
        parsed = [self._batch_request(i, *request.args) for i, request in enumerate(requests)]
        return complete_all(self._model, parsed, slots=self._batch_size)

    def _batch_request(self, number: int, context: str, given: dict[str, Any]) -> BatchRequest:
        """Convert a request of the harness; raises EvalError for unsupported options."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
        longest = self._model.gpt.max_seq_len
        new = min(kwargs.pop("max_gen_toks"), longest // 2)
        if new == longest // 2:
            self.notes.add(f"continuations have at most {new} tokens, half of the model's context")
        stops = kwargs.pop("until")
        kwargs.pop("do_sample", None)
        options: Any = {name: kwargs.pop(name, None) for name in ("top_k", "top_p", "min_p")}
        options["temperature"] = float(kwargs.pop("temperature", 0.0))
        options["seed"] = number
        if kwargs:
            raise EvalError(f"generation_kwargs of the task: {sorted(kwargs)} are not supported")
        prompt = _encode(self._model.tokenizer.encode_prompt, context)
        if len(prompt) > longest - new:
            self.notes.add(_TRUNCATED)
        return BatchRequest(prompt[-(longest - new) :], new, options, stops)

    def _score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each text, and whether greedy decoding would produce it."""
        longest = self._model.gpt.max_seq_len
        sequences = []
        for context, text in pairs:
            if len(text) > longest:
                raise EvalError(
                    f"the task scores a text of {len(text)} tokens at once; the model's "
                    f"max_seq_len is {longest}"
                )
            if len(context) + len(text) > longest + 1:
                self.notes.add(_TRUNCATED)
            sequences.append(np.asarray((context + text)[-(longest + 1) :], np.int32))
        windows = [
            Window(i, 0, len(sequence) - 1 - len(text), len(sequence) - 1)
            for i, (sequence, (_, text)) in enumerate(zip(sequences, pairs, strict=True))
        ]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        for length, batch in plan_batches(windows, longest, self._batch_size):
            filled = make_batch(sequences, batch, self._batch_size, length)
            placed = tjx_parallel.shard_batch(self._model.mesh, filled)
            losses_BT, greedy_BT = jax.device_get(self._step(self._model.params, **placed))
            for window, losses_T, greedy_T in zip(batch, losses_BT, greedy_BT, strict=False):
                scored = slice(window.scored, window.end)
                log_likelihood = -float(losses_T[scored].sum(dtype=np.float64))
                results[window.sequence] = (log_likelihood, bool(greedy_T[scored].all()))
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


_TRUNCATED = "contexts that are too long were truncated to their end"


def _encode(encode: Callable[[str], list[int]], text: str) -> list[int]:
    try:
        return encode(text)
    except ValueError as error:
        raise EvalError(f"a text of the task cannot be encoded: {error}") from error
