"""Int8 weights: quantize the linear layers of a model's blocks, after training.

Dettmers et al. 2022, "LLM.int8()" (section 2, per-output scales, without its outlier columns: the
inputs are not rounded to 8 bits here).
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from tjx_nn.binding import Params, check_params
from tjx_nn.functional import logical_axes
from tjx_nn.quantization.int8 import Int8Kernel, quantize_kernel
from tjx_nn.quantization.linear_layers import linear_layers


def quantize(config: Hashable, params: Params) -> Params:
    """Quantize the kernels of linear layers in the blocks to int8, rounded to nearest.

    The result takes the place of the parameters in `bind`, `generate` and the other functions of
    this package; kernels take a quarter of the memory of float32. Embeddings, the output head,
    norms, biases and the kernels of experts stay as they are. For training with adapters on an int8
    base see `LoRAConfig.base_dtype`.

    Parameters
    ----------
    config
        Configuration of the model.
    params
        Parameters of the model, as from `init`.

    Returns
    -------
    dict
        The parameters, with an `Int8Kernel` for each of those kernels: values int8
        [layers, inputs, outputs] and scale float32 [layers, outputs].

    Raises
    ------
    ValueError
        If the parameters do not fit the model, or it has no linear layers in blocks.

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
    check_params(config, params)
    return _map_kernels(quantize_kernel, config, params)


def quantized_axes(config: Hashable) -> dict[str, Any]:
    """Return the logical axes of each array of `quantize`, nested as its result."""
    return _map_kernels(
        lambda axes: Int8Kernel(axes, (*axes[:-2], axes[-1])), config, logical_axes(config)
    )


def _map_kernels(
    change: Callable[[Any], Int8Kernel], config: Hashable, tree: dict[str, Any]
) -> dict[str, Any]:
    """Replace the leaves that stand for kernels of linear layers in stacked blocks."""
    kernels = {
        f"{path}.kernel"
        for path, layer in linear_layers(config).items()
        if layer.axes[0] == "layers"
    }
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
