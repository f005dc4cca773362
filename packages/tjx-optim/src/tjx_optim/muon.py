"""Muon: orthogonalized momentum for weight matrices, AdamW for all other parameters.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
"Muon is scalable for LLM training". ``optax.contrib.scale_by_muon`` corrects the bias of the
momentum, which neither source does, and keeps its coefficients in the state; this module combines
``optax.trace`` with the Newton-Schulz iteration instead.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_core import ConfigError, Problem
from tjx_optim.param_rules import ParameterRules, leaves_by_path, map_with_path

# Maximize the slope at 0: five iterations bring singular values from 1e-3 up to about 1, and all
# of them between 0.7 and 1.2 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

# An orthogonal [in, out] has the root mean square 1 / sqrt(max(in, out)); AdamW's updates have 0.2
# to 0.4. With this target one learning rate and decay serve both (Liu et al. 2025, section 2.2).
UPDATE_RMS = 0.2


def scale_by_muon(
    settings: dict[str, float | bool], rules: ParameterRules
) -> optax.GradientTransformation:
    """Turn gradients into muon's directions.

    Weight matrices of hidden layers are orthogonalized; embeddings, heads, biases and norms take
    AdamW's direction. `ParameterRules.is_muon_matrix` decides.

    Parameters
    ----------
    settings : dict
        ``momentum`` and ``nesterov`` of the matrices; ``b1``, ``b2`` and ``eps`` of AdamW.
    rules : ParameterRules
        Which parameters are matrices, and how many of their axes stack layers.

    Returns
    -------
    optax.GradientTransformation
        Raises ConfigError from ``init`` if a matrix has not exactly two axes beside its stack
        axes, or if no parameter is a matrix, since all would silently take AdamW's direction.
    """

    def label(path: str, leaf: Any) -> str:
        if not rules.is_muon_matrix(path, leaf.ndim):
            return "adamw"
        stacked = rules.stack_axes(path)
        if leaf.ndim - stacked != 2:
            message = (
                f"got {path} of shape {tuple(leaf.shape)} for muon; expected two axes, [in, out], "
                f"beside the {stacked} that stack layers; pass stack_axes or muon_mask to "
                "make_optimizer, or freeze it"
            )
            raise ConfigError([Problem("params", message)])
        return "matrix"

    def labels(params: Any) -> Any:
        found = map_with_path(label, params)
        by_path = leaves_by_path(found)
        if by_path and "matrix" not in by_path.values():
            message = (
                f"got muon for {len(by_path)} parameters, such as {min(by_path)}; expected a "
                "weight matrix of a hidden layer among them (`kernel`, `*_kernel`, `weight` or "
                "`w`, not of a `head`); rename one, pass muon_mask to make_optimizer, or use adamw"
            )
            raise ConfigError([Problem("name", message)])
        return found

    return optax.partition(
        {
            "matrix": optax.chain(
                optax.trace(settings["momentum"], nesterov=bool(settings["nesterov"])),
                optax.stateless(lambda updates, _: jax.tree.map(_orthogonal_update, updates)),
            ),
            "adamw": optax.scale_by_adam(settings["b1"], settings["b2"], settings["eps"]),
        },
        labels,
    )


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Move the singular values of matrices close to 1 by Newton-Schulz iteration.

    Parameters
    ----------
    matrices : float array [..., rows, columns]
        Each matrix is treated separately.

    Returns
    -------
    array of the same shape and dtype
        The same singular vectors, with singular values mostly between 0.7 and 1.2. A zero matrix
        stays zero.

    Examples
    --------
    >>> import numpy as np
    >>> flat = jax.jit(orthogonalize)(jax.device_put(np.diag([3.0, 1.0, 0.1]).astype("f")))
    >>> bool((abs(np.diag(flat) - 1) < 0.35).all())
    True
    """
    rows, columns = matrices.shape[-2:]
    # The iteration commutes with transposition, and the product over the long side is smaller.
    x: jax.Array = matrices.mT if rows > columns else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if rows > columns else x


def _orthogonal_update(momentum: jax.Array) -> jax.Array:
    rms_to_one = math.sqrt(max(momentum.shape[-2:]))
    return orthogonalize(momentum) * (UPDATE_RMS * rms_to_one)
