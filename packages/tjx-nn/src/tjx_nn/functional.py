"""Models as pure functions of parameters: `init`, `bind`, logical axes, and the model registry.

Parameters are nested dicts of arrays. `bind` makes a model of them inside of `jax.jit`, at no cost
at run time.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tjx_nn.layout import SINGLE_DEVICE, Layout, set_model_layout
from tjx_nn.models.bert import Bert
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit import ViT
from tjx_nn.models.vit_config import ViTConfig
from tjx_nn.registry import registered_models
from tjx_nn.sub_configs import raise_problems

Params = dict[str, Any]
ParamTree = Params | nnx.State[Any, Any]
LogicalAxes = dict[str, Any]

_BUILT_IN: dict[type, Callable[..., nnx.Module]] = {
    GPTConfig: GPT,
    BertConfig: Bert,
    ViTConfig: ViT,
    EncoderDecoderConfig: EncoderDecoder,
}


def register(config_class: type, model: Callable[..., nnx.Module]) -> None:
    """Register the model of a configuration class for `init`, `bind` and `logical_axes`.

    A subclass of a registered configuration, such as your own subclass of `GPTConfig`, uses the
    model of its nearest base class unless you register another one.

    Parameters
    ----------
    config_class
        Class of the configuration. Its instances must be hashable, as a frozen dataclass is.
        The trainer selects a subclass of `TransformerConfig` by the default of its field `family`
        (``--model.family NAME``).
    model
        A `flax.nnx.Module` class, or a function that makes a module: ``model(config, rngs=rngs)``.
        Logical axes of its parameters come from flax's metadata,
        ``nnx.Param(value, out_sharding=("embed", "mlp"), eager_sharding=False)``; parameters
        without metadata are never sharded. A leading axis "layers" marks stacked layers. The
        module may have no other variables, and PRNG streams of its layers are not available.

    Raises
    ------
    ValueError
        If the class is registered with another model, or its instances are not hashable.

    Examples
    --------
    >>> import dataclasses
    >>> from tjx_nn import bind, init, register
    >>> @dataclasses.dataclass(frozen=True)
    ... class LinearConfig:
    ...     features: int = 3
    >>> register(LinearConfig, lambda c, rngs: nnx.Linear(c.features, 2, rngs=rngs))
    >>> params = init(LinearConfig(), jax.random.key(0))
    >>> bind(LinearConfig(), params)(jnp.ones((1, 3))).shape
    (1, 2)
    """
    if getattr(config_class, "__hash__", None) is None:
        raise ValueError(
            f"config_class: got {config_class.__name__}, whose instances are not hashable; "
            "expected a hashable class; make it a frozen dataclass"
        )
    registered = _BUILT_IN.get(config_class) or registered_models.setdefault(config_class, model)
    if registered is not model:
        raise ValueError(
            f"config_class: got {config_class.__name__}, which is registered with {registered}; "
            "expected a new class; register a subclass"
        )


def init(config: Hashable, key: Array) -> Params:
    """Initialize the parameters of a model as a nested dict of float32 arrays.

    The values depend only on the key: they are the same on any mesh (with `out_shardings`).

    Parameters
    ----------
    config
        Configuration of the model; a static argument of `jax.jit`.
    key
        PRNG key from `jax.random.key`.

    Raises
    ------
    ValueError
        If no model is registered for the class of the configuration.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> params["blocks"]["attention"]["query"]["kernel"].shape
    (2, 4, 4)
    """
    params: Params = nnx.to_pure_dict(nnx.state(_make(config, key), nnx.Param))
    return params


@overload
def bind(
    config: GPTConfig, params: ParamTree, *, layout: Layout = ..., n_layer: int | None = ...
) -> GPT: ...


@overload
def bind(
    config: BertConfig, params: ParamTree, *, layout: Layout = ..., n_layer: int | None = ...
) -> Bert: ...


@overload
def bind(
    config: ViTConfig, params: ParamTree, *, layout: Layout = ..., n_layer: int | None = ...
) -> ViT: ...


@overload
def bind(
    config: EncoderDecoderConfig,
    params: ParamTree,
    *,
    layout: Layout = ...,
    n_layer: int | None = ...,
) -> EncoderDecoder: ...


@overload
def bind(
    config: Hashable, params: ParamTree, *, layout: Layout = ..., n_layer: int | None = ...
) -> Any: ...


def bind(
    config: Hashable,
    params: ParamTree,
    *,
    layout: Layout = SINGLE_DEVICE,
    n_layer: int | None = None,
) -> Any:
    """Make the model with the given parameters, inside of `jax.jit`.

    Parameters
    ----------
    config
        Configuration of the model.
    params
        Parameters with the names and shapes of `init`, of any floating-point dtype; a nested
        dict or an `nnx.State`.
    layout
        Layout of activations and parameters on a mesh; the default is a single device.
    n_layer
        Number of stacked blocks in `params`, for a pipeline stage; None is all blocks.

    Raises
    ------
    ValueError
        As `check_params`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, bind, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> logits = jax.jit(lambda params, tokens: bind(config, params)(tokens))
    >>> logits(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    # Checked first: nnx.merge assigns leaves in the sorted order of their names, without a check.
    check_params(config, params, n_layer=n_layer)
    graph, _, rest = _abstract(config)
    model = nnx.merge(graph, params, *rest)
    set_model_layout(model, layout)
    return model


def check_params(config: Hashable, params: Params, *, n_layer: int | None = None) -> None:
    """Check the names, shapes and dtypes of parameters against a configuration.

    Parameters
    ----------
    config
        Configuration of the model.
    params
        Nested dicts of arrays: NumPy, sharded, abstract (`jax.ShapeDtypeStruct`) or traced.
    n_layer
        As for `bind`.

    Raises
    ------
    ValueError
        With a line for each parameter that is missing, unexpected, or has a wrong shape or a dtype
        that is not floating-point.
    """
    given = {
        ".".join(map(_key_name, path)): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]
    }
    expected = param_shapes(config)
    if n_layer is not None:
        stacked = {path for path, axes in _param_axes(config).items() if axes[:1] == ("layers",)}
        expected = {
            path: (n_layer, *shape[1:]) if path in stacked else shape
            for path, shape in expected.items()
        }
    problems = []
    for path, shape in expected.items():
        if path not in given:
            problems.append(f"params {path}: missing; expected shape {list(shape)}")
            continue
        found, dtype = _shape(given[path]), getattr(given[path], "dtype", None)
        if found != shape:
            problems.append(f"params {path}: got {_describe(given[path])}; expected {list(shape)}")
        elif dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            problems.append(f"params {path}: got dtype {dtype}; expected a floating-point dtype")
    problems += [
        f"params {path}: got {_describe(given[path])}; expected no such parameter"
        for path in given
        if path not in expected
    ]
    if problems:
        problems.append(
            f"use the parameters from tjx_nn.init for this {type(config).__name__}, or the "
            "configuration of the given parameters"
        )
    raise_problems(problems)


@functools.lru_cache(maxsize=64)
def param_shapes(config: Hashable) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each parameter by its dotted path, without allocating arrays."""
    flat = nnx.to_flat_state(_abstract(config)[1])
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in flat}


def logical_axes(config: Hashable) -> LogicalAxes:
    """Return the logical axes of each parameter, for sharding rules.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is a tuple with a name for each axis, None for an axis that
        is never sharded. The names are "layers", "vocab", "position" (rows of position and
        token-type tables), "embed", "heads", "kv_heads", "head_dim", "mlp", "expert", "latent" and
        "indexer", and those of registered models.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, logical_axes
    >>> logical_axes(GPTConfig())["blocks"]["mlp"]["up"]["kernel"]
    ('layers', 'embed', 'mlp')
    """
    nested: LogicalAxes = {}
    for path, axes in _param_axes(config).items():
        *parents, leaf = path.split(".")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = axes
    return nested


def stack_axes(config: Hashable) -> dict[str, Any]:
    """Return the number of leading axes of each parameter that stack layers and experts.

    Optimizers that treat a parameter as a matrix (its norm, its singular values) apply to the
    remaining axes, separately for each layer and expert.

    Returns
    -------
    dict
        Nested as the parameters; a leaf is an int.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, stack_axes
    >>> depths = stack_axes(GPTConfig())
    >>> depths["blocks"]["mlp"]["up"]["kernel"], depths["wte"]["embedding"]
    (1, 0)
    """

    def depth(axes: tuple[str | None, ...]) -> int:
        # The last axis is never a stack, even if it counts experts (that of a router).
        stacked = itertools.takewhile(lambda axis: axis in {"layers", "expert"}, axes[:-1])
        return len(list(stacked))

    depths: dict[str, Any] = jax.tree.map(
        depth, logical_axes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
    return depths


def abstract_model(config: Hashable) -> nnx.Module:
    """Return the model of a configuration with abstract arrays."""
    model: nnx.Module = nnx.eval_shape(lambda: _make(config, jax.random.key(0)))
    return model


@functools.lru_cache(maxsize=64)
def _abstract(config: Hashable) -> tuple[Any, Any, list[Any]]:
    """Return the graph definition, abstract parameters and abstract PRNG state of a model."""
    split: Any = nnx.split(abstract_model(config), nnx.Param, nnx.RngState, ...)
    graph, params, rng_state, other = split
    if other:
        raise ValueError(
            f"config: got a {type(config).__name__} whose model has variables other than "
            "parameters "
            f"({', '.join('.'.join(map(str, path)) for path, _ in nnx.to_flat_state(other))}); "
            "expected nnx.Param variables only; remove the others, such as batch statistics"
        )
    return graph, params, [rng_state] if rng_state else []


def _param_axes(config: Hashable) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axes of each parameter by its dotted path, from flax's metadata."""
    axes = {}
    for path, variable in nnx.to_flat_state(_abstract(config)[1]):
        names = variable.get_metadata("out_sharding", None)
        ndim = variable.get_value().ndim
        axes[".".join(map(str, path))] = (None,) * ndim if names is None else tuple(names)
    return axes


def _make(config: Hashable, key: Array) -> nnx.Module:
    models = {**_BUILT_IN, **registered_models}
    for kind in type(config).__mro__:
        if kind in models:
            model: nnx.Module = models[kind](config, rngs=nnx.Rngs(key))
            return model
    raise ValueError(
        f"config: got a {type(config).__name__}; expected one of "
        f"{[kind.__name__ for kind in models]} or a subclass; add it with tjx_nn.register"
    )


def _key_name(key: Any) -> str:
    """Return the name of a key in a pytree path; list elements are numbers."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    shape = getattr(leaf, "shape", None)
    return None if shape is None else tuple(shape)


def _describe(leaf: Any) -> str:
    shape = _shape(leaf)
    return f"a {type(leaf).__name__}" if shape is None else f"shape {list(shape)}"
