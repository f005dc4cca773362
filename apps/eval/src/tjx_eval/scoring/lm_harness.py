"""Adapter of a decoder to lm-evaluation-harness: log-likelihoods and text generation.

Importing this module imports the harness, which takes seconds.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tjx_eval.errors import EvalError
from tjx_eval.generation.batch import BatchRequest, complete_all
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.continuations import ContinuationScorer, Pair, encode_text


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
        self._scorer = ContinuationScorer(model, batch_size=batch_size)

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
        return encode_text(self._model.tokenizer.encode, string)

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
        prompt = encode_text(self._model.tokenizer.encode_prompt, context)
        if len(prompt) > longest - new:
            self.notes.add(_TRUNCATED)
        return BatchRequest(prompt[-(longest - new) :], new, options, stops)

    def _score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each text, and whether greedy decoding would produce it."""
        scores = self._scorer.score(pairs)
        if self._scorer.truncated:
            self.notes.add(_TRUNCATED)
        return [(score.log_likelihood, score.greedy) for score in scores]


_TRUNCATED = "contexts that are too long were truncated to their end"
