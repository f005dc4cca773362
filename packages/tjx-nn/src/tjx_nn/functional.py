"""Parameters of models and layers: `init`, `from_params`, logical and stacked axes, registration.

Parameters are nested dicts of arrays; `tjx_nn.bind` makes a model of them.
"""

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from tjx_nn.binding import Params
from tjx_nn.models.abstract_model import BUILT_IN_MODELS, make_model, param_axes
from tjx_nn.problems import raise_problems
from tjx_nn.registry import registered_models

LogicalAxes = dict[str, Any]


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
    >>> import jax.numpy as jnp
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
    registered = BUILT_IN_MODELS.get(config_class) or registered_models.setdefault(
        config_class, model
    )
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

    Returns
    -------
    dict
        Nested; blocks are stacked along a leading axis.

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
    params: Params = nnx.to_pure_dict(nnx.state(make_model(config, key), nnx.Param))
    return params


def from_params[M: nnx.Module](make: Callable[[nnx.Rngs], M], params: Params) -> M:
    """Make a layer, or any module, with given parameters instead of random ones.

    Parameters
    ----------
    make
        Makes the module; traced without allocating its initial values.
    params
        Nested dict of arrays with the names and shapes of the parameters of the module.

    Returns
    -------
    flax.nnx.Module
        The module; its parameters are those given.

    Raises
    ------
    ValueError
        With a line for each parameter that is missing, unexpected or has another shape, and for
        each variable that is not a parameter, such as a PRNG key: it would have no value.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from tjx_nn import RMSNorm, from_params
    >>> norm = from_params(lambda rngs: RMSNorm(2), {"scale": jnp.array([1.0, 10.0])})
    >>> print(norm(jnp.array([[3.0, 3.0]])).round(2))
    [[ 1. 10.]]
    """
    split: Any = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    graph, state, rest = split
    shapes: dict[Any, Any] = {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    given: dict[Any, Any] = {
        path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.State(params))
    }
    raise_problems(
        [
            f"params {'.'.join(map(str, path))}: got {given.get(path, 'none')}; expected "
            f"{shapes.get(path, 'no such parameter')}"
            for path in sorted(shapes.keys() | given.keys())
            if shapes.get(path) != given.get(path)
        ]
        + [
            f"make: got a module with {'.'.join(map(str, path))}, which is not a parameter; "
            "expected parameters only; make the module itself and assign its parameters"
            for path, _ in nnx.to_flat_state(rest)
        ]
    )
    module: M = nnx.merge(graph, params, rest)
    return module


def logical_axes(config: Hashable) -> LogicalAxes:
    """Return the logical axes of each parameter, for sharding rules.

    Parameters
    ----------
    config
        Configuration of the model.

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
    for path, axes in param_axes(config).items():
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

    Parameters
    ----------
    config
        Configuration of the model.

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
