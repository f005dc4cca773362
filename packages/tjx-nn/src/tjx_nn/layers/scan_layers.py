"""Many blocks, one after the other: a compiled loop over stacked parameters, with remat.

Every parameter of the blocks has a leading axis "layers". Whether the blocks are compiled as a loop
or unrolled, and what the backward pass computes again, changes no parameter and no result.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_kernels.target import current_target
from tjx_nn.config import TransformerConfig

# step(x, layer, window) -> (x, outputs of the layer): `layer` holds the parameters of one block.
Step = Callable[[Array, Any, int | None], tuple[Array, Any]]
# Parameters of layers of one kind, stacked, and the attention window of each.
Stack = tuple[Any, tuple[int | None, ...]]

# Blocks of a stack that are unrolled on GPUs where `scan_layers` is None.
MAX_UNROLLED_LAYERS_ON_GPU = 24
# The same on CPUs without remat, for models of at least this width: narrower ones compile for
# longer than they gain.
MAX_UNROLLED_LAYERS_ON_CPU = 4
MIN_UNROLLED_WIDTH_ON_CPU = 128

_POLICIES: dict[str, Any] = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(
        "flash_attention_out", "flash_attention_lse"
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("flash_attention_out", "flash_attention_lse"),
    ),
}


def run_stack(
    config: TransformerConfig,
    step: Step,
    x: Float[Array, "B T D"],
    layers: Any,
    windows: tuple[int | None, ...],
) -> tuple[Float[Array, "B T D"], Any]:
    """Run `step` over the layers.

    Parameters
    ----------
    config
        Says whether the loop is unrolled, and what is computed again.
    step
        One block.
    x
        The residual stream before the first block.
    layers
        A pytree whose leaves have a leading axis for the layers.
    windows
        The attention window of each layer.

    Returns
    -------
    tuple
        The residual stream after the last block, and the outputs of all layers, stacked.
    """
    count = len(windows)
    if count == 0:
        return x, None
    period = _period(windows)
    # So many blocks are one turn of the loop, and are computed again together.
    turn = min(count, period * -(-config.remat_every // period))
    whole = count // turn * turn
    loop = uses_scan(config, count)
    body: Callable[..., Any] = functools.partial(_turn, step, windows[:turn])
    if config.remat != "none":
        # Inside a loop the compiler cannot merge the second computation with the first.
        body = jax.checkpoint(body, policy=_POLICIES[config.remat], prevent_cse=not loop)
    turns = jax.tree.map(lambda p: p[:whole].reshape(-1, turn, *p.shape[1:]), layers)
    if loop:
        x, outputs = jax.lax.scan(body, x, turns)
    else:
        found = []
        for layers_of_turn in _split(turns):
            x, output = body(x, layers_of_turn)
            found.append(output)
        outputs = jax.tree.map(lambda *each: jnp.stack(each), *found)
    outputs = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), outputs)
    if whole < count:
        rest = jax.tree.map(lambda p: p[whole:], layers)
        x, last = run_stack(config, step, x, rest, windows[whole:])
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, last)
    return x, outputs


def uses_scan(config: TransformerConfig, count: int) -> bool:
    """Tell whether so many blocks are compiled as a loop, for the platform in use.

    A loop copies everything that the backward pass needs of a block to stacked arrays and back. On
    GPUs that costs more than it saves up to `MAX_UNROLLED_LAYERS_ON_GPU` blocks; deeper models
    would take minutes more to compile. Few and wide blocks are unrolled on CPUs too, unless remat
    saves their memory, which XLA:CPU does in loops only.
    """
    if config.scan_layers is not None:
        return config.scan_layers
    platform = current_target().platform
    if platform == "gpu":
        return count > MAX_UNROLLED_LAYERS_ON_GPU
    wide = config.d_model >= MIN_UNROLLED_WIDTH_ON_CPU
    few = count <= MAX_UNROLLED_LAYERS_ON_CPU
    return platform != "cpu" or config.remat != "none" or not (few and wide)


@jax.custom_vjp
def _split(stacked: Any) -> list[Any]:
    """Return what is at each index of the leading axis; its gradient is one concatenation."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda p, i=index: p[i], stacked) for index in range(count)]


def _split_forward(stacked: Any) -> tuple[list[Any], None]:
    return _split(stacked), None


def _split_backward(_: None, cotangents: list[Any]) -> tuple[Any]:
    return (jax.tree.map(_stack_cotangents, *cotangents),)


def _stack_cotangents(*each: Array) -> Any:
    if each[0].dtype == jax.dtypes.float0:  # of integers and keys
        return np.zeros((len(each), *each[0].shape), jax.dtypes.float0)
    return jnp.stack(each)


_split.defvjp(_split_forward, _split_backward)


def _turn(
    step: Step, windows: tuple[int | None, ...], x: Float[Array, "B T D"], layers: Any
) -> tuple[Float[Array, "B T D"], Any]:
    outputs = []
    for index, window in enumerate(windows):
        x, output = step(x, jax.tree.map(lambda p, i=index: p[i], layers), window)
        outputs.append(output)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def _period(windows: tuple[int | None, ...]) -> int:
    """Return after how many layers the pattern of windows repeats."""
    count = len(windows)
    return next(p for p in range(1, count + 1) if windows == (windows[:p] * count)[:count])


def unstack_layers(stacks: list[Stack]) -> list[Any]:
    """Return the layers of all stacks one by one."""
    return [
        jax.tree.map(lambda p, i=index: p[i], layers)
        for layers, windows in stacks
        for index in range(len(windows))
    ]


def stacked[M](make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Make `count` modules of a kind, their parameters stacked."""
    modules: M = nnx.vmap(make)(rngs.split(count))
    return modules


def layer_stacks(config: TransformerConfig, dense_blocks: Any, blocks: Any) -> list[Stack]:
    """Return the stacks of a model in their order: those with an MLP, then those with experts."""
    windows, dense = config.windows, config.n_dense_layer
    first = [] if dense_blocks is None else [(dense_blocks, windows[:dense])]
    return [*first, (blocks, windows[dense:])]


class LayerRange(NamedTuple):
    """Some of a model's blocks, one after the other, in a pipeline.

    Attributes
    ----------
    first
        Number of the first of them; may be traced.
    length
        How many they are.
    """

    first: Int[Array, ""] | int
    length: int


def run_stacks(
    config: TransformerConfig,
    step: Step,
    x: Float[Array, "B T D"],
    stacks: list[Stack],
    dropout_keys: Array | None,
    part: LayerRange | None = None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """Run one stack after the other.

    Parameters
    ----------
    config, x
        As for `run_stack`.
    step
        One block: its layer is (block, dropout key), its outputs are its measures.
    stacks
        What `in_order` returns.
    dropout_keys
        A key for each layer of the model, or None.
    part
        Which blocks `stacks`, then a single one, are; None is all.

    Returns
    -------
    tuple
        The residual stream after the last block, and the measures of each stack.
    """
    if part is not None:
        [(stack, windows)] = stacks
        # Whatever the part, the windows are the same: `TransformerConfig.pipeline_problems`.
        stacks = [(stack, windows[: part.length])]
        if dropout_keys is not None:
            dropout_keys = jax.lax.dynamic_slice_in_dim(dropout_keys, part.first, part.length)
    reported = []
    for stack, windows in stacks:
        keys = None
        if dropout_keys is not None:
            keys, dropout_keys = dropout_keys[: len(windows)], dropout_keys[len(windows) :]
        x, aux_losses = run_stack(config, step, x, (stack, keys), windows)
        reported.append(aux_losses)
    return x, reported


def split_layer_keys(
    config: TransformerConfig, key: Array | None
) -> tuple[Array | None, Array | None]:
    """Split a key that may be absent into one for each layer, and one for the embeddings."""
    if key is None:
        return None, None
    keys = jax.random.split(key, config.n_layer + 1)
    return keys[:-1], keys[-1]
