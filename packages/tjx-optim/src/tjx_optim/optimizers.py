"""Optimizers: a table from name to update direction, and one frame around all of them.

The frame is: clip the gradient; turn it into a direction (the table), weight decay included; scale
by minus the learning rate and by each parameter's own factor. So for adamw a step is
``p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from optax import contrib

from tjx_optim.clipping import clipping_stages
from tjx_optim.moments import stored_as
from tjx_optim.muon import scale_by_muon
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_averaging import average_parameters
from tjx_optim.param_paths import map_with_path
from tjx_optim.param_rules import ParameterRules
from tjx_optim.per_layer import per_layer

Settings = dict[str, float | bool]
Direction = Callable[[Settings, ParameterRules], optax.GradientTransformation]


def _sgd(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Heavy-ball momentum ``m = g + momentum * m``; Sutskever et al. 2013, section 2."""
    momentum = optax.identity()  # without momentum there is nothing to keep
    if settings["momentum"] > 0:
        momentum = optax.trace(settings["momentum"], nesterov=bool(settings["nesterov"]))
    return optax.chain(momentum, _decay(rules))


def _adam(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Adam with the decay as part of the gradient; Kingma and Ba 2015, algorithm 1."""
    return optax.chain(_decay(rules), _scale_by_adam(settings))


def _adamw(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Adam with the decay beside it; Loshchilov and Hutter 2019, algorithm 2."""
    return optax.chain(_scale_by_adam(settings), _decay(rules))


def _lamb(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """AdamW whose length is that of the layer's weights; You et al. 2020, algorithm 2."""
    trust_ratio = per_layer(optax.scale_by_trust_ratio(), rules.stack_axes)
    return optax.chain(_scale_by_adam(settings), _decay(rules), trust_ratio)


def _lion(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Take the sign of a momentum; Chen et al. 2023, algorithm 2."""
    return optax.chain(optax.scale_by_lion(settings["b1"], settings["b2"]), _decay(rules))


def _adafactor(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Take Adafactor's direction; Shazeer and Stern 2018, algorithm 4.

    The learning rate is relative to the size of a layer's weights. Matrices whose sides are both
    at least 128 have factored moments. b1 > 0 adds a momentum, as the authors' T5 has it.
    """
    stages = [
        per_layer(stage, rules.stack_axes)
        for stage in (
            optax.scale_by_factored_rms(decay_rate=settings["b2"], epsilon=settings["eps"]),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    ]
    if settings["b1"] > 0:
        stages.append(optax.ema(settings["b1"], debias=False))
    return optax.chain(*stages, _decay(rules))


def _muon(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Orthogonal momentum for matrices, AdamW for the rest; Liu et al. 2025, section 2."""
    return optax.chain(scale_by_muon(settings, rules), _decay(rules))


def _schedule_free_adamw(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """AdamW without its first moment, which the frame's mean stands for; Defazio et al. 2024."""
    scale = optax.scale_by_rms(
        settings["b2"], settings["eps"], eps_in_sqrt=False, bias_correction=True
    )
    return optax.chain(scale, _decay(rules))


OPTIMIZERS: Mapping[str, Direction] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
}
"""Name -> from the numbers that it heeds and the rules to (clipped gradient -> direction)."""


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.ScalarOrSchedule | None = None,
    *,
    learning_rate_scales: Any = None,
    stack_axes: Any = None,
) -> optax.GradientTransformation:
    """Make the transformation from gradients to updates.

    Parameters
    ----------
    config : OptimizerConfig
        The optimizer by name and its numbers.
    schedule : callable, float or None
        Learning rate by step, as `make_schedule` gives it; None holds ``config.learning_rate``.
    learning_rate_scales : pytree of floats like the parameters, optional
        A factor of the learning rate for each parameter (muP), of its weight decay too.
    stack_axes : pytree of ints like the parameters, optional
        How many leading axes of each parameter stack layers (and experts) on each other: 1 for
        [layers, in, out] and [layers, features], 0 for an embedding. The update of stacked layers
        is that of the same layers kept apart. None: 0 for all.

    Returns
    -------
    optax.GradientTransformation
        ``init(params)`` and ``update(gradients, state, params)``; add the updates to the
        parameters with ``optax.apply_updates``. Both may be jitted. The state holds the moments
        in float32 (or the ``moment_dtype``), under the parameters' own paths.

    Raises
    ------
    ValueError
        From ``init``: when a parameter is narrower than float32 (its second moment would be as
        narrow, and small updates would be lost; compute may be narrow, parameters are not); when
        a tree is not like the parameters; when a group matches no parameter; when muon finds a
        kernel that is no matrix.

    Notes
    -----
    A gradient that is not finite makes every update not finite, since the clip divides by the
    global norm: skip such a step as a whole.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from tjx_optim import OptimizerConfig, make_optimizer
    >>> optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1))
    >>> @jax.jit
    ... def first_update():
    ...     params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
    ...     gradients = jax.tree.map(jnp.ones_like, params)
    ...     updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    ...     return optax.apply_updates(params, updates)
    >>> print(first_update()["dense"]["bias"].round(3))
    [-0.1 -0.1]
    """
    rules = ParameterRules(config, learning_rate_scales, stack_axes)
    rate = config.learning_rate if schedule is None else schedule
    # First of all the clip, so that the moments see the clipped gradient.
    stages = [*clipping_stages(config, rules), _descent(config, rules, rate)]
    if config.ema_decay is not None:
        stages.append(average_parameters(config.ema_decay))
    optimizer = optax.chain(*stages)
    if rules.freezes:
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()},
            lambda params: map_with_path(
                lambda path, _: "frozen" if rules.group(path).frozen else "trained", params
            ),
        )

    def init(params: Any) -> Any:
        rules.check(params)
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def _descent(
    config: OptimizerConfig, rules: ParameterRules, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """From clipped gradients to what is added to the parameters."""
    direction = OPTIMIZERS[config.name](config.settings, rules)
    if config.moment_dtype != "float32":
        direction = stored_as(direction, config.moment_dtype)
    stages = [
        direction,
        optax.scale_by_learning_rate(rate),  # type: ignore[attr-defined]  # public, not re-exported
    ]
    if rules.scales_learning_rates:
        stages.append(_by_path(lambda path, update, _: rules.learning_rate_scale(path) * update))
    if config.name != "schedule_free_adamw":
        return optax.chain(*stages)
    # Steps count from 1 there and from 0 here; a step is weighed by the rate that it takes.
    weighing_rate = (lambda count: rate(count - 1)) if callable(rate) else rate
    return contrib.schedule_free(  # type: ignore[attr-defined]  # public, not re-exported
        optax.chain(*stages), weighing_rate, b1=config.settings["b1"]
    )


def _scale_by_adam(settings: Settings) -> optax.GradientTransformation:
    return optax.scale_by_adam(settings["b1"], settings["b2"], settings["eps"])


def _decay(rules: ParameterRules) -> optax.GradientTransformation:
    """Add to each parameter's update its rate of decay times itself."""

    def add(path: str, update: Any, param: Any) -> Any:
        rate = rules.weight_decay(path)
        return update + rate * param if rate else update

    return _by_path(add)


def _by_path(function: Callable[[str, Any, Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: map_with_path(function, updates, params))
