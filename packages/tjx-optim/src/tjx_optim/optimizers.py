"""Optimizers: a table from name to update direction, with a common chain around it.

The chain clips the gradient, turns it into a direction (the table) with weight decay, and scales it
by minus the learning rate and by each parameter's own factor. So a step of adamw is
``p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from tjx_optim.matrix_optimizers.dion import scale_by_dion
from tjx_optim.matrix_optimizers.muon import scale_by_muon
from tjx_optim.matrix_optimizers.soap import scale_by_soap
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_averaging import average_parameters
from tjx_optim.param_checks import check_params
from tjx_optim.param_rules import ParameterRules, add_weight_decay, map_with_path, update_by_path
from tjx_optim.per_layer import per_layer
from tjx_optim.registry import registered_optimizers

Settings = dict[str, float | bool]
Direction = Callable[[Settings, ParameterRules], optax.GradientTransformation]


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.ScalarOrSchedule | None = None,
    *,
    learning_rate_scales: Any = None,
    stack_axes: Any = None,
    decay_mask: Any = None,
    muon_mask: Any = None,
    weight_decay_scales: Any = None,
    eps_scales: Any = None,
) -> optax.GradientTransformation:
    """Make the transformation from gradients to parameter updates.

    The parameters can be any pytree: nested dicts, an ``nnx.State`` (so it also works with
    ``nnx.Optimizer``), Linen or Haiku parameters, an Equinox module. Biases, norms, embeddings and
    hidden matrices are recognized by path (see `tjx_optim.decay_mask`); where the names do not
    show the role, pass ``decay_mask`` and ``muon_mask``.

    Parameters
    ----------
    config : OptimizerConfig
        Optimizer and its settings.
    schedule : callable, float or None
        Learning rate by step, such as from `make_schedule`; None: ``config.learning_rate``.
    learning_rate_scales : pytree of floats, or arrays that broadcast, like the parameters, optional
        Factor of the learning rate of each parameter (muP), also of its weight decay.
    stack_axes : pytree of ints like the parameters, optional
        How many leading axes of each parameter stack layers (and experts): 1 for [layers, in, out]
        and [layers, features], 0 for an embedding. Stacked layers get the updates that they would
        get as separate parameters. None: 0 for all.
    decay_mask : pytree of bools like the parameters, optional
        Which parameters weight decay applies to; None: by path.
    muon_mask : pytree of bools like the parameters, optional
        Which parameters muon, dion and soap treat as matrices; None: by path.
    weight_decay_scales : pytree of floats like the parameters, optional
        Factor of the weight decay of each parameter, besides that of its learning rate (CompleteP).
    eps_scales : pytree of floats like the parameters, optional
        Factor of ``eps`` of each parameter (CompleteP), for adam, adamw, lamb and
        schedule_free_adamw.

    Returns
    -------
    optax.GradientTransformation
        ``init(params)`` and ``update(gradients, state, params)``, both jittable; add the updates
        to the parameters with ``optax.apply_updates``. Moments are float32 (or ``moment_dtype``)
        and have the paths of their parameters in the state.

    Raises
    ------
    ConfigError
        From ``init``: if a parameter is narrower than float32 (its second moment would be, too,
        and small updates would be lost), a tree does not match the parameters, a group matches no
        parameter, or muon, dion or soap finds no matrix or one that has not two axes.

    Notes
    -----
    One non-finite gradient makes all updates non-finite, since clipping divides by the global
    norm. Skip such a step as a whole; see `tjx_optim.select_finite`.

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
    trees = {
        "learning_rate_scales": learning_rate_scales,
        "stack_axes": stack_axes,
        "decay_mask": decay_mask,
        "muon_mask": muon_mask,
        "weight_decay_scales": weight_decay_scales,
        "eps_scales": eps_scales,
    }
    rules = ParameterRules(config, trees)
    rate = config.learning_rate if schedule is None else schedule
    # Clipping comes first, so that the moments are those of the clipped gradient.
    stages = [*_frozen_layers(rules), *_clipping(config, rules), _descent(config, rules, rate)]
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
        check_params(rules, params)
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def _frozen_layers(rules: ParameterRules) -> list[optax.GradientTransformation]:
    """Set the gradients of stacked layers to 0 whose learning-rate scale is 0.

    They do not count in the global norm then.
    """
    scales = rules.given.get("learning_rate_scales", {})
    if all(np.all(scale) for scale in scales.values()):
        return []
    return [update_by_path(lambda path, g, _: jnp.where(scales[path] != 0, g, 0).astype(g.dtype))]


def _clipping(config: OptimizerConfig, rules: ParameterRules) -> list[optax.GradientTransformation]:
    """Return the configured clipping, from single entries to the global norm.

    The global norm comes last, so that it is the norm of the gradient that the moments see.

    - ``clip_value``: each entry to [-clip_value, clip_value].
    - ``clip_adaptive``: the gradient norm of a unit's incoming weights (a column of a kernel
      [in, out], the whole of a bias) to ``clip_adaptive * max(norm of those weights, 1e-3)``.
      Brock et al. 2021, section 4.1, equation 3.
    - ``clip_norm``: the norm over all entries of all parameters. Pascanu et al. 2013, algorithm 1.
    """
    stages = []
    if config.clip_value is not None:
        stages.append(optax.clip(config.clip_value))
    if config.clip_adaptive is not None:
        # optax decides by rank and would treat stacked biases as a matrix.
        stages.append(per_layer(optax.adaptive_grad_clip(config.clip_adaptive), rules.stack_axes))
    if config.clip_norm is not None:
        stages.append(optax.clip_by_global_norm(config.clip_norm))
    return stages


def _descent(
    config: OptimizerConfig, rules: ParameterRules, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Return the transformation from clipped gradients to updates."""
    direction = _direction(config, rules)
    if config.moment_dtype != "float32":
        direction = _store_state_as(direction, config.moment_dtype)
    stages = [
        direction,
        optax.scale_by_learning_rate(rate),  # type: ignore[attr-defined]  # public, not re-exported
    ]
    if rules.scales_learning_rates:
        stages.append(
            update_by_path(lambda path, update, _: rules.learning_rate_scale(path) * update)
        )
    if config.name != "schedule_free_adamw":
        return optax.chain(*stages)
    # contrib.schedule_free counts steps from 1, schedules from 0.
    weighing_rate = (lambda count: rate(count - 1)) if callable(rate) else rate
    return contrib.schedule_free(  # type: ignore[attr-defined]  # public, not re-exported
        optax.chain(*stages), weighing_rate, b1=config.settings["b1"]
    )


def _direction(config: OptimizerConfig, rules: ParameterRules) -> optax.GradientTransformation:
    if config.name in registered_optimizers:
        registered = registered_optimizers[config.name]
        return optax.chain(registered.make_direction(config.settings), add_weight_decay(rules))
    return OPTIMIZERS[config.name](config.settings, rules)


def _store_state_as(
    transformation: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """Store the floating-point state of a transformation in a narrower dtype.

    An update computes in float32 and rounds the new state to nearest; the update itself uses the
    state before rounding. DeepSeek-AI 2024, "DeepSeek-V3", section 3.3.2, stores both moments of
    AdamW this way.
    """

    def cast(tree: Any, dtype: str) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            tree,
        )

    def init(params: Any) -> Any:
        return cast(transformation.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = transformation.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _sgd(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Heavy-ball momentum ``m = g + momentum * m``; Sutskever et al. 2013, section 2."""
    momentum = optax.identity()
    if settings["momentum"] > 0:
        momentum = optax.trace(settings["momentum"], nesterov=bool(settings["nesterov"]))
    return optax.chain(momentum, add_weight_decay(rules))


def _adam(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Adam with L2 regularization in the gradient; Kingma and Ba 2015, algorithm 1."""
    return optax.chain(add_weight_decay(rules), _scale_by_adam(settings, rules))


def _adamw(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Adam with decoupled weight decay; Loshchilov and Hutter 2019, algorithm 2."""
    return optax.chain(_scale_by_adam(settings, rules), add_weight_decay(rules))


def _lamb(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """AdamW scaled to the norm of the layer's weights; You et al. 2020, algorithm 2."""
    trust_ratio = per_layer(optax.scale_by_trust_ratio(), rules.stack_axes)
    return optax.chain(_scale_by_adam(settings, rules), add_weight_decay(rules), trust_ratio)


def _lion(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Take the sign of a momentum; Chen et al. 2023, algorithm 2."""
    return optax.chain(optax.scale_by_lion(settings["b1"], settings["b2"]), add_weight_decay(rules))


def _adafactor(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Use Adafactor's direction; Shazeer and Stern 2018, algorithm 4.

    The learning rate is relative to the size of a layer's weights. Matrices whose sides are both
    at least 128 have factored moments. b1 > 0 adds a momentum, as in the authors' T5.
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
    return optax.chain(*stages, add_weight_decay(rules))


def _muon(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Orthogonal momentum for matrices, AdamW for the rest; Liu et al. 2025, section 2."""
    return optax.chain(scale_by_muon(settings, rules), add_weight_decay(rules))


def _dion(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Low-rank orthonormal updates for matrices; Ahn et al. 2025, algorithm 1."""
    return optax.chain(scale_by_dion(settings, rules), add_weight_decay(rules))


def _soap(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Adam in the eigenbasis of Shampoo for matrices; Vyas et al. 2024, algorithm 3."""
    return optax.chain(scale_by_soap(settings, rules), add_weight_decay(rules))


def _schedule_free_adamw(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """AdamW whose first moment `_descent` replaces by averaging; Defazio et al. 2024."""
    scale = optax.scale_by_rms(
        settings["b2"], settings["eps"], eps_in_sqrt=False, bias_correction=True
    )
    return optax.chain(_with_eps_scales(scale, rules), add_weight_decay(rules))


OPTIMIZERS: Mapping[str, Direction] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "dion": _dion,
    "soap": _soap,
    "schedule_free_adamw": _schedule_free_adamw,
}
"""The built-in update directions by name; `register_optimizer` adds others."""


def _scale_by_adam(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(settings["b1"], settings["b2"], settings["eps"])
    return _with_eps_scales(adam, rules)


def _with_eps_scales(
    direction: optax.GradientTransformation, rules: ParameterRules
) -> optax.GradientTransformation:
    """Multiply the ``eps`` of each parameter by its factor.

    The direction m / (sqrt(v) + scale * eps) of a gradient g is m / (sqrt(v) + eps) of g / scale.
    """
    if (scales := rules.given.get("eps_scales")) is None:
        return direction
    return optax.chain(update_by_path(lambda path, g, _: g / scales[path]), direction)
