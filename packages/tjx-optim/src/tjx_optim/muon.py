"""Muon: momentum whose matrices are made orthogonal, and AdamW for all that is no matrix.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
"Muon is scalable for LLM training". ``optax.contrib.scale_by_muon`` corrects the bias of the
momentum, which neither source does, and keeps its coefficients in the state; so what is here is a
momentum of optax and the iteration itself.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tjx_optim.param_paths import is_hidden_matrix, leaves_by_path, map_with_path
from tjx_optim.param_rules import ParameterRules

# Chosen for the slope at 0: five steps bring singular values from 1e-3 up to about 1, and all of
# them between 0.7 and 1.2 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

# An orthogonal [in, out] has the root mean square 1 / sqrt(max(in, out)); AdamW's updates have 0.2
# to 0.4, so with this one learning rate and decay serve both (Liu et al. 2025, section 2.2).
UPDATE_RMS = 0.2


def scale_by_muon(
    settings: dict[str, float | bool], rules: ParameterRules
) -> optax.GradientTransformation:
    """Turn gradients into muon's directions.

    Hidden matrices are told from their paths: ``kernel`` or ``*_kernel``, of a module that is no
    ``head``. Embeddings, heads, biases and norms take AdamW's direction.

    Parameters
    ----------
    settings : dict
        ``momentum`` and ``nesterov`` of the matrices; ``b1``, ``b2`` and ``eps`` of the rest.
    rules : ParameterRules
        Which axes stack layers.

    Raises
    ------
    ValueError
        From ``init``, for a kernel that has not exactly two axes beside those of its stack, and
        where no parameter is a hidden matrix: all of them would take AdamW's direction.
    """

    def kind(path: str, leaf: Any) -> str:
        if not is_hidden_matrix(path):
            return "adamw"
        stacked = rules.stack_axes(path)
        if leaf.ndim - stacked != 2:
            raise ValueError(
                f"{path} {tuple(leaf.shape)}: muon needs two axes, [in, out], beside the "
                f"{stacked} that stack layers; pass stack_axes to make_optimizer, store the kernel "
                "so, or freeze it"
            )
        return "matrix"

    def kinds(params: Any) -> Any:
        found = map_with_path(kind, params)
        labels = leaves_by_path(found)
        if labels and "matrix" not in labels.values():
            raise ValueError(
                f"optimizer.name: got muon for {len(labels)} parameters, the first {min(labels)}; "
                "expected a matrix of a hidden layer (a `kernel` or `*_kernel`, not of a `head`) "
                "among them; name one so, or give adamw"
            )
        return found

    return optax.partition(
        {
            "matrix": optax.chain(
                optax.trace(settings["momentum"], nesterov=bool(settings["nesterov"])),
                optax.stateless(lambda updates, _: jax.tree.map(_orthogonal_update, updates)),
            ),
            "adamw": optax.scale_by_adam(settings["b1"], settings["b2"], settings["eps"]),
        },
        kinds,
    )


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Bring the singular values of matrices near 1 and leave their vectors.

    Parameters
    ----------
    matrices : float array [..., rows, columns]
        Each is treated alone.

    Returns
    -------
    array of the same shape and dtype
        Singular values mostly between 0.7 and 1.2. A matrix of zeros stays one.

    Examples
    --------
    >>> import numpy as np
    >>> flat = jax.jit(orthogonalize)(jax.device_put(np.diag([3.0, 1.0, 0.1]).astype("f")))
    >>> bool((abs(np.diag(flat) - 1) < 0.35).all())
    True
    """
    rows, columns = matrices.shape[-2:]
    # The iteration commutes with transposing, and the product of the short side is the smaller.
    x: jax.Array = matrices.mT if rows > columns else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if rows > columns else x


def _orthogonal_update(momentum: jax.Array) -> jax.Array:
    rms_to_one = math.sqrt(max(momentum.shape[-2:]))
    return orthogonalize(momentum) * (UPDATE_RMS * rms_to_one)
