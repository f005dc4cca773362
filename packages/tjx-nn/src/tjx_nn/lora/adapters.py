"""Adapters as a tree of parameters beside those of the model: init, bind, merge and unmerge.

The tree is nested as the parameters, with "a", "b" and for DoRA "magnitude" for each layer. Stacked
layers have stacked adapters.

Axes in names: I input features, O output features, R rank.
"""

from collections.abc import Callable, Hashable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn.initializers import uniform
from jaxtyping import Array, Float

from tjx_nn import binding
from tjx_nn.binding import Params
from tjx_nn.functional import logical_axes as model_axes
from tjx_nn.layers.linear import Linear
from tjx_nn.layout import SINGLE_DEVICE, Layout
from tjx_nn.lora.adapter import Adapter, column_norms
from tjx_nn.lora_config import LoRAConfig
from tjx_nn.problems import raise_problems
from tjx_nn.quantization.kernels import dequantize
from tjx_nn.quantization.linear_layers import LinearLayer, linear_layers
from tjx_nn.quantization.params import quantize, quantized_axes

Adapters = dict[str, Any]


def init(config: Hashable, lora: LoRAConfig, key: Array, params: Params | None = None) -> Adapters:
    """Initialize adapters that do not change the model: b is 0.

    Parameters
    ----------
    config
        Configuration of the model.
    lora
        Configuration of the adapters.
    key
        PRNG key from `jax.random.key`; a is uniform in +- 1 / sqrt(I), as in PEFT.
    params
        Parameters of the model, for the magnitudes of DoRA: the norms of its kernels.

    Returns
    -------
    dict
        Float32 arrays: "a" [..., I, R], "b" [..., R, O] and with `dora` "magnitude" [..., O].

    Raises
    ------
    ValueError
        If a pattern matches no linear layer.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, LoRAConfig, lora
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> adapters = lora.init(config, LoRAConfig(rank=3, targets="query"), jax.random.key(0))
    >>> jax.tree.map(lambda x: x.shape, adapters)
    {'blocks': {'attention': {'query': {'a': (2, 4, 3), 'b': (2, 3, 4)}}}}
    """
    flat: dict[str, Array] = {}
    for number, (path, layer) in enumerate(targets(config, lora).items()):
        *lead, n_in, n_out = layer.shape
        symmetric = uniform(2 * n_in**-0.5)(
            jax.random.fold_in(key, number), (*lead, n_in, lora.rank), jnp.float32
        )
        flat[f"{path}.a"] = symmetric - n_in**-0.5
        flat[f"{path}.b"] = jnp.zeros((*lead, lora.rank, n_out), jnp.float32)
        if lora.dora:
            if params is None:
                raise ValueError("params: got None; DoRA needs the parameters of the model")
            flat[f"{path}.magnitude"] = column_norms(_flatten(params)[f"{path}.kernel"])
    return _unflatten(flat)


def bind(
    config: Hashable,
    lora: LoRAConfig,
    params: Params,
    adapters: Adapters,
    *,
    layout: Layout = SINGLE_DEVICE,
) -> Any:
    """Make the model with adapters, inside of `jax.jit`; as `tjx_nn.bind`.

    It is meant for training: the gradient of the adapters needs no gradient of the kernels. For
    generation `merge` the adapters first.

    Parameters
    ----------
    config, params, layout
        As of `tjx_nn.bind`; kernels and embeddings can have a narrower dtype.
    lora
        Configuration of the adapters.
    adapters
        Adapters with the paths of `init`.

    Raises
    ------
    ValueError
        As `tjx_nn.bind`, or if the adapters do not fit the model.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, LoRAConfig, lora, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> low_rank = LoRAConfig(rank=3)
    >>> @jax.jit
    ... def logits(key, tokens):
    ...     params, adapters = init(config, key), lora.init(config, low_rank, key)
    ...     return lora.bind(config, low_rank, params, adapters)(tokens)
    >>> logits(jax.random.key(0), jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """
    check_adapters(config, lora, adapters)
    model = binding.bind(config, params, layout=layout)
    flat = _flatten(adapters)
    layers = targets(config, lora)
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and name in layers:
            module.adapter = Adapter(
                flat[f"{name}.a"],
                flat[f"{name}.b"],
                flat.get(f"{name}.magnitude"),
                scale=lora.scale,
                axes=module.axes,
                layout=layout,
            )
    return model


def base_params(config: Hashable, lora: LoRAConfig, params: Params) -> Params:
    """Return the parameters of the model in `lora.base_dtype`, as the base of adapters.

    Parameters
    ----------
    config, lora
        As of `bind`.
    params
        Parameters of the model.

    Raises
    ------
    ValueError
        As `tjx_nn.quantize`.
    """
    if lora.base_dtype in ("int8", "int4"):
        return quantize(config, params, lora.base_dtype)
    base: Params = jax.tree.map(lambda p: p.astype(lora.base_dtype), params)
    return base


def base_axes(config: Hashable, lora: LoRAConfig) -> dict[str, Any]:
    """Return the logical axes of each array of `base_params`."""
    if lora.base_dtype in ("int8", "int4"):
        return quantized_axes(config, lora.base_dtype)
    return model_axes(config)


def merge(params: Params, adapters: Adapters, lora: LoRAConfig) -> Params:
    """Return the parameters with the adapters added to the kernels, in the dtype of the kernels.

    Parameters
    ----------
    params
        Parameters of the model.
    adapters, lora
        As of `bind`.
    """

    def merged(kernel: Array, adapter: Mapping[str, Array]) -> Array:
        found = kernel.astype(jnp.float32) + _delta(adapter, lora)
        if "magnitude" in adapter:
            factor: Array = adapter["magnitude"] / column_norms(found)
            found = found * factor[..., None, :]
        return found

    return _map_kernels(merged, params, adapters)


def unmerge(params: Params, adapters: Adapters, lora: LoRAConfig) -> Params:
    """Return the parameters of the model from merged ones, up to rounding.

    Raises
    ------
    ValueError
        For DoRA, whose norms cannot be recovered: keep the parameters of the model instead.
    """
    if lora.dora:
        raise ValueError(
            "lora.dora: got True; expected LoRA, as merging DoRA discards the norms; keep the "
            "parameters before merging"
        )
    return _map_kernels(
        lambda kernel, adapter: kernel.astype(jnp.float32) - _delta(adapter, lora), params, adapters
    )


def logical_axes(config: Hashable, lora: LoRAConfig) -> dict[str, Any]:
    """Return the logical axes of each adapter, nested as `init`; the rank is never sharded."""
    flat: dict[str, tuple[str | None, ...]] = {}
    for path, layer in targets(config, lora).items():
        *lead, axis_in, axis_out = layer.axes
        flat[f"{path}.a"] = (*lead, axis_in, None)
        flat[f"{path}.b"] = (*lead, None, axis_out)
        if lora.dora:
            flat[f"{path}.magnitude"] = (*lead, axis_out)
    return _unflatten(flat)


def stack_axes(config: Hashable, lora: LoRAConfig) -> dict[str, Any]:
    """Return the number of leading axes of each adapter that stack layers, for optimizers."""
    depths: dict[str, Any] = jax.tree.map(
        lambda axes: int(axes[0] == "layers"),
        logical_axes(config, lora),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return depths


def targets(config: Hashable, lora: LoRAConfig) -> dict[str, LinearLayer]:
    """Return the linear layers that adapters apply to, by dotted path.

    Raises
    ------
    ValueError
        If a pattern matches no linear layer.
    """
    layers = linear_layers(config)
    unused = [
        pattern for pattern in lora.patterns if not any(_matches(path, pattern) for path in layers)
    ]
    if unused:
        raise ValueError(
            f"lora.targets: got {', '.join(unused)}; expected patterns of linear layers: "
            f"{', '.join(layers)}"
        )
    return {
        path: layer
        for path, layer in layers.items()
        if any(_matches(path, pattern) for pattern in lora.patterns)
    }


def check_adapters(config: Hashable, lora: LoRAConfig, adapters: Adapters) -> None:
    """Check the paths and shapes of adapters; their ranks can differ from `lora.rank`.

    Raises
    ------
    ValueError
        With a line for each adapter that is missing, unexpected or of a wrong shape.
    """
    given = {path: tuple(leaf.shape) for path, leaf in _flatten(adapters).items()}
    problems = []
    for path, layer in targets(config, lora).items():
        *lead, n_in, n_out = layer.shape
        rank = given.get(f"{path}.a", (lora.rank,))[-1]
        expected = {"a": (*lead, n_in, rank), "b": (*lead, rank, n_out)}
        if lora.dora:
            expected["magnitude"] = (*lead, n_out)
        for name, shape in expected.items():
            if (found := given.pop(f"{path}.{name}", None)) != shape:
                got = "none" if found is None else f"shape {list(found)}"
                problems.append(f"adapters {path}.{name}: got {got}; expected {list(shape)}")
    problems += [f"adapters {path}: got one; expected none, see lora.targets" for path in given]
    raise_problems(problems)


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _delta(adapter: Mapping[str, Array], lora: LoRAConfig) -> Float[Array, "*layers I O"]:
    delta: Array = lora.scale * jnp.matmul(
        jnp.asarray(adapter["a"]), jnp.asarray(adapter["b"]), precision="highest"
    )
    return delta


def _map_kernels(
    change: Callable[[Array, Mapping[str, Array]], Array], params: Params, adapters: Adapters
) -> Params:
    flat = _flatten(dequantize(params))
    flat_adapters = _flatten(adapters)
    for path in {path.rpartition(".")[0] for path in flat_adapters}:
        names = ("a", "b", "magnitude")
        adapter = {n: x for n in names if (x := flat_adapters.get(f"{path}.{n}")) is not None}
        kernel = flat[f"{path}.kernel"]
        flat[f"{path}.kernel"] = change(kernel, adapter).astype(kernel.dtype)
    return _unflatten(flat)


_flatten: Callable[[Any], dict[str, Any]] = partial(flatten_dict, sep=".")
_unflatten: Callable[[Any], dict[str, Any]] = partial(unflatten_dict, sep=".")
