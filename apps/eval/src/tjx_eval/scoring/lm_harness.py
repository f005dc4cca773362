"""The model as lm-evaluation-harness asks it: log-likelihoods of texts, and continuations.

Importing this module imports the harness, which takes seconds.

Names of array axes: B rows, T tokens in a row.
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
from tjx_eval.generation.batch import Task, write_all
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.windows import Row, fill_batch, plan_batches
from tjx_metrics import cross_entropy
from tjx_parallel.config import MeshConfig
from tjx_trainer.tasks.sampling import encode_prompt
from tjx_trainer.training.mesh_layout import make_layout

# Tokens before a text, and the text: what the model is asked about.
Pair = tuple[list[int], list[int]]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # untyped
    """A model for the harness.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    batch_size : int
        Rows at once; changes no result.
    """

    def __init__(self, model: TrainedModel, *, batch_size: int) -> None:
        super().__init__()
        self._model = model
        devices = model.mesh.size
        self._batch_size = -(-batch_size // devices) * devices
        self.notes: set[str] = set()  # what the user should know of how tasks were run
        self._layout = make_layout(
            model.gpt, model.mesh, tjx_parallel.ShardingRules(), MeshConfig()
        )
        self._step = jax.jit(self._scores_of_batch)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context: the end of another document, or a line."""
        return encode_prompt(self._model.tokenizer, "")[0]

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests under."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; nothing is added."""
        del add_special_tokens
        return _encoded(self._model.tokenizer.encode, string)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each token scored once."""
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
        for owner, (log_likelihood, _) in zip(owners, self._scored(pairs), strict=True):
            sums[owner] += log_likelihood
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._scored([(before, text) for _, before, text in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations, each up to what ends it."""
        del disable_tqdm
        tasks = [self._task(i, *request.args) for i, request in enumerate(requests)]
        return write_all(self._model, tasks, slots=self._batch_size)

    def _task(self, number: int, context: str, given: dict[str, Any]) -> Task:
        wishes: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
        longest = self._model.gpt.max_seq_len
        new = min(wishes.pop("max_gen_toks"), longest // 2)
        if new == longest // 2:
            self.notes.add(f"continuations have at most {new} tokens, half of the model's context")
        stops = wishes.pop("until")
        wishes.pop("do_sample", None)
        options: Any = {name: wishes.pop(name, None) for name in ("top_k", "top_p", "min_p")}
        options["temperature"] = float(wishes.pop("temperature", 0.0))
        options["seed"] = number
        if wishes:
            raise EvalError(f"generation_kwargs {sorted(wishes)} of the task are not known here")
        prompt = _encoded(self._model.tokenizer.encode_prompt, context)
        if len(prompt) > longest - new:
            self.notes.add("of contexts that are too long the end was read")
        return Task(prompt[-(longest - new) :], new, options, stops)

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return of each text its log-likelihood, and whether greedy writing would write it."""
        longest = self._model.gpt.max_seq_len
        stretches = []
        for before, text in pairs:
            if len(text) > longest:
                raise EvalError(
                    f"a text of {len(text)} tokens is to be scored at once and the model's longest "
                    f"sequence is {longest}: this task is not for it"
                )
            if len(before) + len(text) > longest + 1:
                self.notes.add("of contexts that are too long the end was read")
            stretches.append(np.asarray((before + text)[-(longest + 1) :], np.int32))
        rows = [
            Row(i, 0, len(stretch) - 1 - len(text), len(stretch) - 1)
            for i, (stretch, (_, text)) in enumerate(zip(stretches, pairs, strict=True))
        ]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for length, batch in plan_batches(rows, longest, self._batch_size):
            filled = fill_batch(stretches, batch, self._batch_size, length)
            placed = tjx_parallel.shard_batch(self._model.mesh, filled)
            losses_BT, right_BT = jax.device_get(self._step(self._model.params, **placed))
            for row, of_row, right in zip(batch, losses_BT, right_BT, strict=False):
                here = slice(row.scored, row.end)
                log_likelihood = -float(of_row[here].sum(dtype=np.float64))
                found[row.stretch] = (log_likelihood, bool(right[here].all()))
        return found

    def _scores_of_batch(
        self, params: Any, tokens: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss of each label [B, T], and whether it is the likeliest token."""
        network = tjx_nn.bind(self._model.gpt, params, layout=self._layout)
        # A row at a time: the logits of all would not fit.
        hidden_BTD = network.hidden(tokens)

        def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits_TV = network.logits(row[0])
            return cross_entropy(logits_TV, row[1]), logits_TV.argmax(-1) == row[1]

        found: tuple[jax.Array, jax.Array] = jax.lax.map(of_row, (hidden_BTD, labels))
        return found


def _encoded(encode: Callable[[str], list[int]], text: str) -> list[int]:
    try:
        return encode(text)
    except ValueError as error:
        raise EvalError(f"a text of the task cannot be encoded: {error}") from error
