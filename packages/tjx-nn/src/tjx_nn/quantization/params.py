"""Int8 and int4 weights: quantize the linear layers of a model's blocks, after training.

Dettmers et al. 2022, "LLM.int8()" (section 2, per-output scales, without its outlier columns: the
inputs are not rounded to 8 bits here); Dettmers and Zettlemoyer 2023, "The case for 4-bit
precision" (section 2, groups of weights).
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from tjx_nn.binding import Params, check_params
from tjx_nn.functional import logical_axes
from tjx_nn.quantization.int4 import int4_axes, quantize_int4
from tjx_nn.quantization.int8 import int8_axes, quantize_int8
from tjx_nn.quantization.kernels import QuantizedKernel
from tjx_nn.quantization.linear_layers import block_kernels

_QUANTIZE: dict[str, Callable[[Any], QuantizedKernel]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
}
_AXES: dict[str, Callable[[Any], QuantizedKernel]] = {"int8": int8_axes, "int4": int4_axes}


def quantize(config: Hashable, params: Params, dtype: str = "int8") -> Params:
    """Quantize the kernels of linear layers in the blocks to int8 or int4, rounded to nearest.

    The result takes the place of the parameters in `bind`, `generate` and the other functions of
    this package; kernels take a quarter of the memory of float32 in int8, and a seventh in int4.
    Embeddings, the output head, norms, biases and the kernels of experts stay as they are. For
    training with adapters on a quantized base see `LoRAConfig.base_dtype`.

    Parameters
    ----------
    config
        Configuration of the model.
    params
        Parameters of the model, as from `init`.
    dtype
        "int8" has a scale for each output. "int4" has a scale and a zero point for each output and
        group of 128 inputs, or the largest even divisor of the inputs below.

    Returns
    -------
    dict
        The parameters, with an `Int8Kernel` or `Int4Kernel` for each of those kernels.

    Raises
    ------
    ValueError
        If the parameters do not fit the model, it has no linear layers in blocks, `dtype` is
        another one, or a layer for int4 has an odd number of inputs.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, dequantize, init, quantize
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = quantize(config, init(config, jax.random.key(0)))
    >>> params["blocks"]["mlp"]["up"]["kernel"].values.dtype
    dtype('int8')
    >>> dequantize(params)["blocks"]["mlp"]["up"]["kernel"].shape
    (2, 4, 16)
    """
    if dtype not in _QUANTIZE:
        raise ValueError(f"dtype: got {dtype!r}; expected one of {list(_QUANTIZE)}")
    check_params(config, params)
    return _map_kernels(_QUANTIZE[dtype], config, params)


def quantized_axes(config: Hashable, dtype: str = "int8") -> dict[str, Any]:
    """Return the logical axes of each array of `quantize`, nested as its result."""
    return _map_kernels(_AXES[dtype], config, logical_axes(config))


def _map_kernels(
    change: Callable[[Any], QuantizedKernel], config: Hashable, tree: dict[str, Any]
) -> dict[str, Any]:
    """Replace the leaves that stand for kernels of linear layers in stacked blocks."""
    kernels = block_kernels(config)
    if not kernels:
        raise ValueError(
            f"config: got a {type(config).__name__} without linear layers in stacked blocks; "
            "expected a model with some"
        )

    def changed(path: Any, leaf: Any) -> Any:
        is_kernel = jax.tree_util.keystr(path, simple=True, separator=".") in kernels
        return change(leaf) if is_kernel else leaf

    tree_of_kernels: dict[str, Any] = jax.tree.map_with_path(
        changed, tree, is_leaf=lambda node: isinstance(node, tuple)
    )
    return tree_of_kernels
