"""Evaluation metrics that other packages add. Standard library only: `LogConfig` reads it."""

import re
from collections.abc import Callable
from typing import Any

from tjx_core import ConfigError, Problem

_BUILT_IN = re.compile(r"loss|perplexity|bits_per_token|bits_per_byte|exact_match|top\d+_accuracy")

registered_metrics: dict[str, Callable[[Any, Any], Any]] = {}


def register_metric(name: str, values: Callable[[Any, Any], Any]) -> None:
    """Add an evaluation metric that `LogConfig.metrics` and `EvaluationSums.zero` select by name.

    The metric is the mean of its values over all labels, whatever the batches.

    Parameters
    ----------
    name : str
        The name. Registering a name again replaces the entry, unless it is built in.
    values : callable
        From logits (float array [..., vocab]) and labels (int array [...], negative where a label
        is ignored) to the value of each label (float array [...]). It must be traceable by JAX.

    Raises
    ------
    ConfigError
        If the name is that of a built-in metric, is empty, or contains a comma.

    Examples
    --------
    >>> from tjx_metrics import LogConfig, register_metric
    >>> register_metric("max_logit", lambda logits, labels: logits.max(-1))
    >>> LogConfig(metrics=("max_logit",)).metrics
    ('max_logit',)
    """
    if not name or "," in name or _BUILT_IN.fullmatch(name):
        message = (
            f"got {name!r}; expected a name without commas that is not built in (loss, perplexity, "
            "bits_per_token, bits_per_byte, exact_match, top1_accuracy, ...); choose another"
        )
        raise ConfigError([Problem("name", message)])
    registered_metrics[name] = values
