"""Linear layers and norms with the options of a model."""

import math
from dataclasses import replace
from typing import Any

from flax import nnx

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import Linear
from tjx_nn.layers.norms import LayerNorm, RMSNorm


def linear(
    config: TransformerConfig,
    axes: tuple[str | None, str | None],
    shape: tuple[int, int],
    *,
    rngs: nnx.Rngs,
    residual: bool = False,
    bias: bool | None = None,
    float8: bool = True,
) -> Linear:
    """Make a `Linear` with the dtype, bias and initializer of a model.

    Parameters
    ----------
    config
        Configuration of the model.
    axes
        Logical axes of the kernel, input and output; None for an axis that is never sharded.
    shape
        Number of input and output features.
    rngs
        Source of random initial values.
    residual
        Whether the output is added to the residual stream, which scales down the initial values.
    bias
        Whether to add a bias; None is `config.bias`.
    float8
        Whether the layer follows `config.float8`; otherwise it never uses 8-bit floats.
    """
    # muP scales only kernels whose two axes both grow with the width.
    std = config.init_std if None in axes else initial_std(config, residual=residual)
    return Linear(
        shape,
        axes=axes,
        dtype=config.dtype,
        std=std,
        use_bias=config.bias if bias is None else bias,
        rngs=rngs,
        float8=config.float8 and float8,
    )


def of_sizes(config: TransformerConfig | int, **sizes: int | None) -> TransformerConfig:
    """Return a configuration, or the default one of a width `d_model`, with other sizes.

    Sizes that are None do not change.
    """
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if isinstance(config, int):
        config = TransformerConfig(d_model=config, n_head=given.get("n_head", 1))
    return replace(config, **given) if given else config


def initial_std(config: TransformerConfig, *, residual: bool) -> float:
    """Return the standard deviation of the initializer of a kernel.

    Kernels that write to the residual stream are divided by sqrt(2 * n_layer), the square root of
    the number of sublayers (GPT-2), or are 0 with `zero_init_residual`. With muP the variance is
    proportional to 1 / width (Yang et al. 2022, table 8). With CompleteP it does not depend on the
    depth, as the multiplier of the sublayers does (Dey et al. 2025, table 1).
    """
    if residual and config.zero_init_residual:
        return 0.0
    std = config.init_std / math.sqrt(config.width_multiplier)
    depth = config.mup_base_depth or config.n_layer
    return std / math.sqrt(2 * depth) if residual else std


def make_norm(
    config: TransformerConfig, features: int | None = None, *, axis: str = "embed"
) -> LayerNorm | RMSNorm:
    """Make the norm of a model (`config.norm`), by default over the residual stream."""
    features = config.d_model if features is None else features
    if config.norm == "rmsnorm":
        offset = 1.0 if config.norm_unit_offset else 0.0
        return RMSNorm(features, eps=config.norm_eps, axis=axis, offset=offset)
    return LayerNorm(features, eps=config.norm_eps, bias=config.bias, axis=axis)
