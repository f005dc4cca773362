"""Blocks as stacked parameters: their construction, and their conversion to a list."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.scan_layers import Stack


def stack_blocks[M](
    config: TransformerConfig, make: Callable[..., M], rngs: nnx.Rngs
) -> tuple[M | None, M]:
    """Make the blocks of a model in one or two stacks, as for `layer_stacks`.

    Parameters
    ----------
    config
        Configuration of the model; `n_leading_layer` of its blocks are a stack of their own.
    make
        Makes a block, with the arguments `experts`, `attention_norm` and `rngs` of `Block`.
    rngs
        Source of random initial values.

    Returns
    -------
    dense_blocks
        The leading blocks, or those between blocks with experts; None if there are none.
    blocks
        The other blocks.
    """
    leading, experts = config.n_leading_layer, config.experts.count > 0
    first = None
    if leading:
        first = stack_layers(
            lambda r: make(attention_norm=config.first_norm, rngs=r), leading, rngs
        )
    rest = config.n_layer - leading
    return first, stack_layers(lambda r: make(experts=experts, rngs=r), rest, rngs)


def stack_layers[M](make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Make `count` modules of one kind with stacked parameters, whose first axis is "layers"."""
    stack = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})
    modules: M = stack(rngs.split(count))
    return modules


def unstack_layers(stacks: list[Stack]) -> list[Any]:
    """Return the blocks of all stacks as a list."""
    return [
        jax.tree.map(lambda p, i=index: p[i], layers)
        for layers, windows in stacks
        for index in range(len(windows))
    ]
