"""CORE: the mean of the centered accuracies of the tasks of a bundle (DCLM, nanochat).

Prompts, examples before them and the choice of an option are those of nanochat: options are
compared by their mean loss per token, and a language modeling task is right if greedy decoding
produces the continuation.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.continuations import (
    ContinuationScore,
    ContinuationScorer,
    Pair,
    encode_text,
)
from tjx_eval.scoring.core_bundle import CoreTask, Example
from tjx_eval.scoring.score import ProgressCallback, no_progress

# Seeds of nanochat: of the order of the examples, and of the examples before a prompt.
_ORDER_SEED, _FEWSHOT_SEED = 1337, 1234


class CoreResult(NamedTuple):
    """Result of a task.

    Attributes
    ----------
    label : str
        Name of the task.
    examples : int
        Number of scored examples.
    accuracy : float
        Share of right examples.
    centered : float
        (accuracy - baseline) / (1 - baseline), with the accuracy of random guesses as the baseline:
        0 for guesses, 1 for a perfect model.
    """

    label: str
    examples: int
    accuracy: float
    centered: float


def core_metric(results: Sequence[CoreResult]) -> float:
    """Return CORE, the mean of the centered accuracies.

    Examples
    --------
    >>> core_metric([CoreResult("a", 4, 0.5, 0.0), CoreResult("b", 4, 0.75, 0.5)])
    0.25
    """
    return sum(result.centered for result in results) / len(results)


def center(accuracy: float, baseline: float) -> float:
    """Return the centered accuracy; the baseline is in percent.

    Examples
    --------
    >>> center(0.75, 50.0)
    0.5
    """
    return (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)


def score_task(
    model: TrainedModel,
    scorer: ContinuationScorer,
    task: CoreTask,
    *,
    limit: int | None = None,
    on_progress: ProgressCallback = no_progress,
) -> CoreResult:
    """Compute the accuracy of a decoder in a task.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    scorer : ContinuationScorer
        Scorer of the model.
    task : CoreTask
        The task.
    limit : int, optional
        Read at most this many examples, the first ones of a fixed random order, or as many as the
        examples before a prompt need.
    on_progress : callable
        As for `ContinuationScorer.score`.

    Raises
    ------
    EvalError
        If the tokenizer cannot represent a text, or a continuation is longer than the context.
    """
    examples = list(task.examples)
    random.Random(_ORDER_SEED).shuffle(examples)  # noqa: S311  the order of nanochat
    examples = examples[: limit and max(limit, task.num_fewshot + 1)]
    pairs = [make_pairs(model, task, examples, index) for index in range(len(examples))]
    scores = iter(scorer.score([pair for each in pairs for pair in each], on_progress))
    right = 0
    for example, options in zip(examples, pairs, strict=True):
        found = [next(scores) for _ in options]
        right += _is_right(task, example, options, found)
    accuracy = right / len(examples)
    return CoreResult(task.label, len(examples), accuracy, center(accuracy, task.baseline))


def make_pairs(
    model: TrainedModel, task: CoreTask, examples: Sequence[Example], index: int
) -> list[Pair]:
    """Return the tokens of the context and of the scored continuation of every option.

    The scored tokens are those after the common start of all options of a multiple-choice task, the
    common end of all options of a schema task, and those after the context of a language modeling
    task; at least one.
    """
    others = [i for i in range(len(examples)) if i != index]
    rng = random.Random(_FEWSHOT_SEED + index)  # noqa: S311  the examples of nanochat
    chosen = rng.sample(others, task.num_fewshot)
    shots = "".join(
        f"{one.contexts[one.gold]}{task.delimiter}{one.continuations[one.gold]}\n\n"
        for one in (examples[i] for i in chosen)
    )
    example = examples[index]
    start = model.tokenizer.encode_prompt("")[:1]

    def encode(context: str, continuation: str) -> list[int]:
        text = f"{shots}{context}{task.delimiter}{continuation}"
        # Without a continuation, a space at the end would be a token of its own.
        text = text if continuation else text.strip()
        return [*start, *encode_text(model.tokenizer.encode, text)]

    rows = list(map(encode, example.contexts, example.continuations))
    most = min(map(len, rows)) - 1  # of the tokens given, and of those scored
    if task.kind == "schema":
        scored = max(1, min(_common_start([row[::-1] for row in rows]), most))
        return [(row[:-scored], row[-scored:]) for row in rows]
    compared = rows
    if task.kind == "language_modeling":
        compared = [*rows, encode(example.contexts[0], "")]
    given = max(1, min(_common_start(compared), most))
    return [(row[:given], row[given:]) for row in rows]


def _common_start(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all rows share."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _is_right(
    task: CoreTask, example: Example, options: Sequence[Pair], scores: Sequence[ContinuationScore]
) -> bool:
    if task.kind == "language_modeling":
        return scores[0].greedy
    losses = [
        -score.log_likelihood / len(text) for score, (_, text) in zip(scores, options, strict=True)
    ]
    return losses.index(min(losses)) == example.gold
