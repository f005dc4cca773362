"""Quantized kernels of every format: their product with an input, and dequantization."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tjx_nn.layout import ParamSharding
from tjx_nn.quantization.int4 import Int4Kernel
from tjx_nn.quantization.int8 import Int8Kernel

# Kernels that take the place of an array in the parameters of a model.
QuantizedKernel = Int8Kernel | Int4Kernel


def is_quantized(node: Any) -> bool:
    """Return whether a node of a tree is a quantized kernel; for ``is_leaf=``."""
    return isinstance(node, QuantizedKernel)


def dequantize(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with float32 arrays in place of quantized kernels.

    Parameters
    ----------
    params
        Parameters from `tjx_nn.quantize`.

    Returns
    -------
    dict
        Parameters as from `tjx_nn.init`.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, dequantize, init, quantize
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = dequantize(quantize(config, init(config, jax.random.key(0))))
    >>> params["blocks"]["mlp"]["up"]["kernel"].dtype
    dtype('float32')
    """
    dense: dict[str, Any] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if isinstance(leaf, QuantizedKernel) else leaf,
        params,
        is_leaf=is_quantized,
    )
    return dense


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_matmul(
    sharding: ParamSharding, x: Float[Array, "*any I"], w: QuantizedKernel
) -> Float[Array, "*any O"]:
    """Multiply with a quantized kernel, which has no gradient; otherwise as `linear.matmul`.

    Parameters
    ----------
    sharding
        Sharding of the weight.
    x
        Input; the result has its dtype.
    w
        Kernel of a single layer.
    """
    return w.gathered(sharding).product(x).astype(x.dtype)


def _forward(
    sharding: ParamSharding, x: Array, w: QuantizedKernel
) -> tuple[Array, QuantizedKernel]:
    return quantized_matmul(sharding, x, w), w


def _backward(sharding: ParamSharding, w: QuantizedKernel, dy: Array) -> tuple[Array, None]:
    return dy @ w.gathered(sharding).astype(dy.dtype).T, None


quantized_matmul.defvjp(_forward, _backward)
