"""Muon: orthogonalized momentum for weight matrices, AdamW for all other parameters.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
"Muon is scalable for LLM training". ``optax.contrib.scale_by_muon`` corrects the bias of the
momentum, which neither source does, and keeps its coefficients in the state; this module combines
``optax.trace`` with the Newton-Schulz iteration instead.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.matrix_optimizers.partition import UPDATE_RMS, partition_matrices
from tjx_optim.param_rules import ParameterRules

# Maximize the slope at 0: five iterations bring singular values from 1e-3 up to about 1, and all
# of them between 0.7 and 1.2 (Jordan et al. 2024).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# Each polynomial is the optimal one for the interval of singular values that those before it leave
# of [1e-3, 1]; the last leaves [0.87, 1.13] (Amsel et al. 2025, "The Polar Express: Optimal Matrix
# Sign Methods and Their Application to the Muon Algorithm").
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def scale_by_muon(
    settings: dict[str, float | bool], rules: ParameterRules
) -> optax.GradientTransformation:
    """Turn gradients into muon's directions.

    Weight matrices of hidden layers are orthogonalized; embeddings, heads, biases and norms take
    AdamW's direction. `ParameterRules.is_muon_matrix` decides.

    Parameters
    ----------
    settings : dict
        ``momentum``, ``nesterov``, ``polar_express`` and ``neuron_b2`` of the matrices; ``b1``,
        ``b2`` and ``eps`` of AdamW.
    rules : ParameterRules
        Which parameters are matrices, and how many of their axes stack layers.

    Returns
    -------
    optax.GradientTransformation
        See `partition_matrices` for the errors of ``init``.
    """
    return partition_matrices(
        "muon",
        rules,
        optax.chain(
            optax.trace(settings["momentum"], nesterov=bool(settings["nesterov"])),
            _orthogonal_updates(
                POLAR_EXPRESS if settings["polar_express"] else NEWTON_SCHULZ,
                settings["neuron_b2"],
            ),
        ),
        settings,
    )


def orthogonalize(
    matrices: jax.Array, coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ
) -> jax.Array:
    """Move the singular values of matrices close to 1 by odd polynomials of the matrix.

    Parameters
    ----------
    matrices : float array [..., rows, columns]
        Each matrix is treated separately.
    coefficients : sequence of (a, b, c)
        Maps a singular value x to ``a x + b x^3 + c x^5``, one after the other: `NEWTON_SCHULZ` or
        `POLAR_EXPRESS`.

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
    for a, b, c in coefficients:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if rows > columns else x


def _orthogonal_updates(
    coefficients: Sequence[tuple[float, float, float]], neuron_b2: float
) -> optax.GradientTransformation:
    """Orthogonalize matrices [..., in, out] and scale them to `UPDATE_RMS`.

    With `neuron_b2`, each output is divided by the root of the moving mean of its squares: NorMuon,
    Li et al. 2025, "NorMuon: Making Muon more efficient and scalable", algorithm 1.
    """

    def init(params: Any) -> Any:
        if not neuron_b2:
            return optax.EmptyState()
        return jax.tree.map(lambda p: jnp.zeros_like(p[..., :1, :]), params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        orthogonal = jax.tree.map(lambda m: orthogonalize(m, coefficients), updates)
        if not neuron_b2:
            return jax.tree.map(_with_full_rank_rms, orthogonal), state
        state = jax.tree.map(
            lambda v, x: neuron_b2 * v + (1 - neuron_b2) * jnp.mean(x**2, axis=-2, keepdims=True),
            state,
            orthogonal,
        )
        return jax.tree.map(
            lambda x, v: _with_rms(x / (jnp.sqrt(v) + 1e-8)), orthogonal, state
        ), state

    return optax.GradientTransformation(init, update)


def _with_full_rank_rms(orthogonal: jax.Array) -> jax.Array:
    """Scale orthogonal matrices by the factor that gives those of full rank `UPDATE_RMS`."""
    return orthogonal * (UPDATE_RMS * math.sqrt(max(orthogonal.shape[-2:])))


def _with_rms(matrices: jax.Array) -> jax.Array:
    """Scale each matrix to `UPDATE_RMS`; a zero matrix stays zero."""
    rms = jnp.sqrt(jnp.mean(matrices**2, axis=(-2, -1), keepdims=True))
    scaled: jax.Array = matrices * (UPDATE_RMS / (rms + 1e-7))
    return scaled
