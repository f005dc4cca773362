"""Loop over stacked blocks: `jax.lax.scan` or unrolled, with rematerialization.

Every parameter of the blocks has a leading axis "layers". Neither scanning nor rematerialization
changes a parameter or a result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels.target import current_target
from tjx_nn.config import TransformerConfig

# Auxiliary losses and statistics of a layer by name, scalars; [layers] for a stack of layers.
AuxLosses = dict[str, Float32[Array, "..."]]
# step(x, (block, dropout_key), window) -> (x, auxiliary losses of the block).
Step = Callable[[Array, Any, int | None], tuple[Array, AuxLosses]]
# Stacked blocks of one kind, and the attention window of each block.
Windows = tuple[int | None, ...]
Stack = tuple[Any, Windows]

# Deepest stack that GPUs unroll if `scan_layers` is None.
MAX_UNROLLED_LAYERS_ON_GPU = 24
# The same for CPUs without remat, from this width on: narrower models gain less than compilation
# costs.
MAX_UNROLLED_LAYERS_ON_CPU = 12
MIN_UNROLLED_WIDTH_ON_CPU = 128

_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(
    "flash_attention_out", "flash_attention_lse"
)
_REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "attention": _SAVE_ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
}


class LayerRange(NamedTuple):
    """Contiguous range of a model's blocks: the blocks of a pipeline stage.

    Attributes
    ----------
    first
        Index of the first block; may be traced.
    length
        Number of blocks.
    """

    first: Int[Array, ""] | int
    length: int


def run_layers(
    config: TransformerConfig,
    step: Step,
    x: Float[Array, "B T D"],
    stacks: list[Stack],
    dropout_keys: Array | None,
    layers: LayerRange | None = None,
) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
    """Run all blocks of a model, or those of one pipeline stage.

    Parameters
    ----------
    step
        Applies one block: ``step(x, (block, dropout_key), window) -> (x, aux_losses)``.
    x
        Residual stream before the first block.
    stacks
        Result of `layer_stacks`.
    dropout_keys
        PRNG key of each block of the model, or None without dropout.
    layers
        Blocks that `stacks` holds, then a single stack; None is all blocks.

    Returns
    -------
    x, aux_losses
        Residual stream after the last block; auxiliary losses of each stack, arrays [layers].
    """
    if layers is not None:
        [(blocks, windows)] = stacks
        # All stages have the same windows: `TransformerConfig.pipeline_problems` checks it.
        stacks = [(blocks, windows[: layers.length])]
        if dropout_keys is not None:
            dropout_keys = jax.lax.dynamic_slice_in_dim(dropout_keys, layers.first, layers.length)
    aux_losses = []
    for blocks, windows in stacks:
        keys = None
        if dropout_keys is not None:
            keys, dropout_keys = dropout_keys[: len(windows)], dropout_keys[len(windows) :]
        x, stack_losses = _run_stack(config, step, x, (blocks, keys), windows)
        aux_losses.append(stack_losses)
    return x, aux_losses


def _run_stack(
    config: TransformerConfig,
    step: Step,
    x: Float[Array, "B T D"],
    layers: Any,
    windows: Windows,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run stacked layers in groups, each the body of one scan iteration and one remat region."""
    count = len(windows)
    if count == 0:
        return x, None
    # A multiple of the period of the windows, which are static inside of the scan.
    period = next(p for p in range(1, count + 1) if windows == (windows[:p] * count)[:count])
    group = min(count, period * -(-config.remat_every // period))
    grouped = count // group * group
    scan = uses_scan(config, count)

    def run_group(x: Array, layers: Any) -> tuple[Array, Any]:
        outputs = []
        for index, window in enumerate(windows[:group]):
            x, output = step(x, _layer(layers, index), window)
            outputs.append(output)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *outputs)

    body: Callable[..., Any] = run_group
    if config.remat != "none":
        # Inside of a scan XLA cannot merge the recomputation with the forward pass.
        policy = _REMAT_POLICIES[config.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    groups = jax.tree.map(lambda p: p[:grouped].reshape(-1, group, *p.shape[1:]), layers)
    if scan:
        x, outputs = jax.lax.scan(body, x, groups)
    else:
        unrolled = []
        for layers_of_group in _split(groups):
            x, output = body(x, layers_of_group)
            unrolled.append(output)
        outputs = jax.tree.map(lambda *each: jnp.stack(each), *unrolled)
    outputs = jax.tree.map(lambda y: y.reshape(grouped, *y.shape[2:]), outputs)
    if grouped < count:
        rest = jax.tree.map(lambda p: p[grouped:], layers)
        x, last = _run_stack(config, step, x, rest, windows[grouped:])
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, last)
    return x, outputs


def uses_scan(config: TransformerConfig, count: int) -> bool:
    """Return whether `count` stacked blocks run in a scan on the current platform.

    A scan copies the residuals of each block to stacked arrays and back. On GPUs this costs more
    than it saves up to `MAX_UNROLLED_LAYERS_ON_GPU` blocks; deeper models would take minutes longer
    to compile unrolled. On CPUs this holds for few and wide blocks, unless remat saves memory,
    which XLA:CPU does in scans only.
    """
    if config.scan_layers is not None:
        return config.scan_layers
    platform = current_target().platform
    if platform == "gpu":
        return count > MAX_UNROLLED_LAYERS_ON_GPU
    wide = config.d_model >= MIN_UNROLLED_WIDTH_ON_CPU
    few = count <= MAX_UNROLLED_LAYERS_ON_CPU
    return platform != "cpu" or config.remat != "none" or not (few and wide)


def _layer(stacked: Any, index: int) -> Any:
    """Return one layer of stacked parameters and keys.

    Keys are cloned, as the backward pass of remat takes the key of a layer once more.
    """

    def take(p: Any) -> Any:
        if jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
            p = clone_key(p)
        return p[index]

    return jax.tree.map(take, stacked)


@jax.custom_vjp
def _split(stacked: Any) -> list[Any]:
    """Split the leading axis into a list; the gradient is a single stack, no sum of scatters."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [_layer(stacked, index) for index in range(count)]


def _split_forward(stacked: Any) -> tuple[list[Any], None]:
    return _split(stacked), None


def _split_backward(_: None, cotangents: list[Any]) -> tuple[Any]:
    return (jax.tree.map(_stack_cotangents, *cotangents),)


def _stack_cotangents(*each: Array) -> Any:
    if each[0].dtype == jax.dtypes.float0:  # of integers and PRNG keys
        return np.zeros((len(each), *each[0].shape), jax.dtypes.float0)
    return jnp.stack(each)


_split.defvjp(_split_forward, _split_backward)


def layer_stacks(stack_windows: tuple[Windows, ...], dense_blocks: Any, blocks: Any) -> list[Stack]:
    """Return the stacks of a model in order: its leading blocks, if they differ, then the others.

    The stacks have the windows of `TransformerConfig.stack_windows`. `dense_blocks` holds the
    leading blocks, or those between blocks with experts; None for a model without.
    """
    if (count := len(stack_windows) // 2) > 1:
        pairs = zip(_split_groups(dense_blocks, count), _split_groups(blocks, count), strict=True)
        return list(zip((stack for pair in pairs for stack in pair), stack_windows, strict=True))
    dense_windows, windows = stack_windows
    first = [] if dense_blocks is None else [(dense_blocks, dense_windows)]
    return [*first, (blocks, windows)]


def _split_groups(stacked: Any, count: int) -> list[Any]:
    groups = jax.tree.map(lambda p: p.reshape(count, -1, *p.shape[1:]), stacked)
    if isinstance(jax.tree.leaves(groups)[0], np.ndarray):  # views
        return [_layer(groups, index) for index in range(count)]
    return _split(groups)


def split_layer_keys(
    config: TransformerConfig, key: Array | None
) -> tuple[Array | None, Array | None]:
    """Split an optional PRNG key into one key for each block, and one for the embeddings.

    Embeddings and blocks are called separately and split the same key; each uses its own part.
    """
    if key is None:
        return None, None
    keys = jax.random.split(clone_key(key), config.n_layer + 1)
    return keys[:-1], keys[-1]


def clone_key(key: Array) -> Array:
    """Return a copy of PRNG keys that counts as unused; `jax.random.clone` has no derivative."""
    data = jax.random.key_data(key)
    copy: Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return copy
