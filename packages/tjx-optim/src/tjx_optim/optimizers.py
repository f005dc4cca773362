"""Optimizers: a table from name to update direction, and one frame around all of them.

The frame is: clip the gradient by its global norm; turn it into a direction (the table); add the
decoupled weight decay to the parameters that decay; scale by minus the learning rate. So for
adamw a step is ``p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.paths import decay_mask, path_strings

Direction = Callable[[OptimizerConfig], optax.GradientTransformation]


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Take Adam's direction; Loshchilov and Hutter, 2019, algorithm 2 without the decay."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """Take the sign of a momentum; Chen et al., 2023, algorithm 2."""
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def _sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    """Take heavy-ball momentum ``m = g + b1 * m``; Sutskever et al., 2013, section 2."""
    return optax.trace(decay=config.b1)


OPTIMIZERS: Mapping[str, Direction] = {"adamw": _adamw, "lion": _lion, "sgd": _sgd}


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.ScalarOrSchedule | None = None,
    *,
    learning_rate_scales: Any = None,
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

    Returns
    -------
    optax.GradientTransformation
        ``init(params)`` and ``update(gradients, state, params)``; add the updates to the
        parameters with ``optax.apply_updates``. Both may be jitted. The state holds the moments
        in the parameters' dtype (float32) and shapes, under the parameters' own paths.

    Raises
    ------
    ValueError
        From ``init``, when a parameter is narrower than float32: its second moment would be as
        narrow, and small updates would be lost. Compute may be narrow; parameters are not.

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
    stages = [
        OPTIMIZERS[config.name](config),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=partial(decay_mask, decay_embeddings=config.decay_embeddings),
        ),
        optax.scale_by_learning_rate(  # type: ignore[attr-defined]  # public, not re-exported
            config.learning_rate if schedule is None else schedule
        ),
    ]
    if learning_rate_scales is not None:
        stages.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(lambda u, s: s * u, updates, learning_rate_scales)
            )
        )
    if config.clip_norm is not None:
        # First of all, so that the moments see the clipped gradient.
        stages.insert(0, optax.clip_by_global_norm(config.clip_norm))
    optimizer = optax.chain(*stages)

    def init(params: Any) -> Any:
        _refuse_narrow_parameters(params)
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def _refuse_narrow_parameters(params: Any) -> None:
    paths = jax.tree.leaves(path_strings(params))
    narrow = [
        f"{path} ({leaf.dtype})"
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    ]
    if narrow:
        raise ValueError(
            f"{len(narrow)} parameters are narrower than float32, the first is {narrow[0]}: "
            "keep parameters in float32 and cast them inside the model to compute in less"
        )
