"""The dial: from one number to the values of a run, by rules with sources.

Every rule is a function of the values before it in `RULES`, so a value that is set by its own flag
changes the values that follow from it. Sources:

- A single number of depth: Karpathy 2025, "nanochat". The width is proportional to it: the ratio
  hardly matters (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", figure 5; with
  CompleteP over a wider range: Dey et al. 2025, section 5).
- Parametrization: muP over the width (Yang et al. 2022, "Tensor Programs V", table 8) and CompleteP
  over the depth (Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep
  transformers", table 1), which keep the tuned learning rate of the base model.
- Tokens: 20 per parameter (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models",
  table 3), of the parameters of the blocks, 12 n_layer d_model^2 (Kaplan et al. 2020, section 2.1).
- Batch: 0.0306 D^0.383 sequences of 2048 tokens for D tokens, below the critical batch size, which
  grows with D as well and not with the model (Bergsma et al. 2025, "Power Lines: Scaling Laws for
  Weight Decay and Batch Size in LLM Pre-training"). Their runs have 2e9 tokens and more; below
  6e7 the batch gives 1000 steps (docs/scaling.md has the measurement).
- Learning rate: the tuned value, times the square root of the batch over that of the rule (Malladi
  et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms").
- Weight decay: AdamW averages updates over 1 / (learning rate x decay) steps. In units of the run
  this is 1.084 R^-0.527 for R tokens per parameter (Bergsma et al. 2025; Wang and Aitchison 2024).
- Schedule: linear to 0 after a warm-up of a tenth (Bergsma et al. 2025, "Straight to Zero: Why
  Linearly Decaying the Learning Rate to Zero Works Best for LLMs").
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tjx_core import ConfigError
from tjx_trainer.config.config_tree import flatten, leaves
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.scale_config import MAX_DEPTH, ScaleConfig

Values = Mapping[str, Any]

# The model at which the learning rate was tuned: the dial at depth 4.
BASE_WIDTH, BASE_DEPTH, BASE_RATE = 256, 4, 4e-3
MIN_STEPS = 1000


@dataclass(frozen=True)
class Rule:
    """A value that the dial sets.

    Attributes
    ----------
    name : str
        Dotted name of the value.
    value : callable
        From the dial's settings and the values before it to the value.
    about : str
        The rule in words.
    """

    name: str
    value: Callable[[ScaleConfig, Values], Any]
    about: str


def block_params(values: Values) -> int:
    """Return the parameters of the blocks by formula, without biases and norms.

    Parameters
    ----------
    values : mapping of str to Any
        Values by dotted name.

    Examples
    --------
    >>> block_params({"model.n_layer": 12, "model.d_model": 768})
    84934656
    """
    return int(12 * values["model.n_layer"] * values["model.d_model"] ** 2)


def training_tokens(scale: ScaleConfig, values: Values) -> float:
    """Return the training tokens of the dial for a model.

    Parameters
    ----------
    scale : ScaleConfig
        Settings of the dial.
    values : mapping of str to Any
        Values by dotted name.

    Examples
    --------
    >>> values = {"model.n_layer": 4, "model.d_model": 256}
    >>> training_tokens(ScaleConfig(depth=4), values)
    62914560.0
    """
    if scale.flops is not None:
        return scale.flops / (6 * block_params(values))
    return scale.tokens_per_parameter * block_params(values)


def _depth(scale: ScaleConfig, values: Values) -> int:
    del values
    if scale.flops is None:
        assert scale.depth is not None
        return scale.depth
    depth = (_params_of_flops(scale) / (12 * scale.width_per_layer**2)) ** (1 / 3)
    return int(min(max(1, round(depth)), MAX_DEPTH))


def _width(scale: ScaleConfig, values: Values) -> int:
    if scale.flops is None:
        return scale.head_size * -(-scale.width_per_layer * _layers(values) // scale.head_size)
    width = math.sqrt(_params_of_flops(scale) / (12 * _layers(values)))
    return scale.head_size * max(1, round(width / scale.head_size))


def _params_of_flops(scale: ScaleConfig) -> float:
    """Return the parameters of the blocks that spend the FLOPs on their training tokens."""
    assert scale.flops is not None
    return math.sqrt(scale.flops / (6 * scale.tokens_per_parameter))


def _layers(values: Values) -> int:
    return int(values["model.n_layer"])


def _heads(scale: ScaleConfig, values: Values) -> int:
    width = values["model.d_model"]
    return max(n for n in range(1, max(1, width // scale.head_size) + 1) if width % n == 0)


def _best_batch(scale: ScaleConfig, values: Values) -> float:
    """Return the batch with the lowest loss [tokens]."""
    tokens = training_tokens(scale, values)
    return float(min(2048 * 0.0306 * tokens**0.383, tokens / MIN_STEPS))


def _batch(scale: ScaleConfig, values: Values) -> int:
    sequences: float = _best_batch(scale, values) / values["data.seq_len"]
    return 8 * round(sequences / 8) if sequences >= 16 else max(1, round(sequences))


def _batch_tokens(values: Values) -> int:
    return int(values["train.batch_size"] * values["data.seq_len"])


def _steps(scale: ScaleConfig, values: Values) -> int:
    return max(1, round(training_tokens(scale, values) / _batch_tokens(values)))


def _rate(scale: ScaleConfig, values: Values) -> float:
    return _rounded(BASE_RATE * math.sqrt(_batch_tokens(values) / _best_batch(scale, values)))


def _decay(scale: ScaleConfig, values: Values) -> float:
    del scale
    steps = values["train.max_steps"]
    ratio = steps * _batch_tokens(values) / block_params(values)
    timescale = 1.084 * ratio**-0.527
    return _rounded(1 / (values["optimizer.learning_rate"] * timescale * steps))


def _warmup_fraction(scale: ScaleConfig, values: Values) -> float | None:
    del scale
    return None if values["schedule.warmup_steps"] else 0.1


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _constant(value: Any) -> Callable[[ScaleConfig, Values], Any]:
    return lambda *_: value


RULES: Sequence[Rule] = (
    Rule("model.n_layer", _depth, "the dial"),
    Rule(
        "model.d_model",
        _width,
        "scale.width_per_layer x n_layer or of the FLOPs, in whole heads",
    ),
    Rule("model.n_head", _heads, "d_model / scale.head_size"),
    Rule("model.d_head", _constant(None), "d_model / n_head"),
    Rule("model.n_kv_head", _constant(None), "n_head"),
    Rule("model.d_ff", _constant(None), "4 x d_model; gated: 2/3 of that"),
    Rule("model.mup_base", _constant(BASE_WIDTH), "muP from the base width (Yang 2022)"),
    Rule("model.mup_base_depth", _constant(BASE_DEPTH), "CompleteP from the base depth (Dey 2025)"),
    Rule("train.batch_size", _batch, "0.0306 D^0.383 x 2048 tokens (Bergsma 2025) or 1000 steps"),
    Rule("train.max_steps", _steps, "scale.tokens_per_parameter, or FLOPs / 6N (Hoffmann 2022)"),
    Rule("optimizer.name", _constant("adamw"), "the optimizer of the rules below"),
    Rule("optimizer.learning_rate", _rate, "4e-3 x sqrt(batch / batch by rule) (Malladi 2022)"),
    Rule("optimizer.weight_decay", _decay, "timescale 1.084 (D/N)^-0.527 runs (Bergsma 2025)"),
    Rule("schedule.name", _constant("linear"), "linear to 0 (Bergsma 2025)"),
    Rule("schedule.warmup_steps", _constant(0), "a fraction instead"),
    Rule("schedule.warmup_fraction", _warmup_fraction, "a tenth of the run (Bergsma 2025)"),
    Rule("schedule.final_fraction", _constant(0.0), "linear to 0 (Bergsma 2025)"),
)
"""What the dial sets, in order: N are parameters of the blocks, D training tokens."""


def with_dial(layers: Sequence[Values]) -> list[Values]:
    """Insert the values that the dial sets below the layer that turns it.

    Parameters
    ----------
    layers : sequence of mappings
        Values by dotted name; later layers override earlier ones.

    Returns
    -------
    list of mappings
        The layers, with one more if the dial is in use. Values of its layer and above are given:
        they override the rules, and the rules of other values use them.

    Examples
    --------
    >>> _, dial, flags = with_dial([{"train.max_steps": 7}, {"scale.depth": 2}])
    >>> dial["model.d_model"], dial["train.max_steps"]
    (128, 960)
    """
    turned = [
        at for at, layer in enumerate(layers) if {"scale.depth", "scale.flops"} & layer.keys()
    ]
    merged = {name: value for layer in layers for name, value in layer.items()}
    try:
        scale = _scale_of(merged)
    except ConfigError:
        return [*layers]  # reported with the other problems
    sized = [merged[name] for name in _SIZES if name in merged]
    if not scale.is_set or any(not size > 0 for size in sized):
        return [*layers]
    at = turned[-1]
    below = {name: value for layer in layers[:at] for name, value in layer.items()}
    given = {name: value for layer in layers[at:] for name, value in layer.items()}
    values = {name: leaf.default for name, leaf in leaves().items()} | below | given
    ruled = {}
    for rule in RULES:
        if rule.name not in given:
            values[rule.name] = ruled[rule.name] = rule.value(scale, values)
    return [*layers[:at], ruled, *layers[at:]]


_SIZES = (
    "model.n_layer", "model.d_model", "data.seq_len", "train.batch_size", "train.max_steps",
    "optimizer.learning_rate",
)  # fmt: skip


def _scale_of(values: Values) -> ScaleConfig:
    names = (field.name for field in fields(ScaleConfig))
    return ScaleConfig(**{n: values[f"scale.{n}"] for n in names if f"scale.{n}" in values})


def describe_dial(config: Config) -> list[str]:
    """Return the table of the dial: each value, its rule, and the value of the rule if it differs.

    Parameters
    ----------
    config : Config
        The resolved configuration.

    Returns
    -------
    list of str
        Lines; empty without the dial.
    """
    scale, values = config.scale, flatten(config)
    if not scale.is_set:
        return []
    params, tokens = block_params(values), values["train.max_steps"] * _batch_tokens(values)
    lines = [
        f"dial           {params:,} parameters in blocks, {tokens:,} tokens "
        f"({tokens / params:.1f} per parameter), {6 * params * tokens:.3g} FLOPs"
    ]
    for rule in RULES:
        value, ruled = values[rule.name], rule.value(scale, values)
        own = "" if value == ruled else f"given; rule: {_format(ruled)}: "
        lines.append(f"  {rule.name:<26}{_format(value):<10}{own}{rule.about}")
    return lines


def _format(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
