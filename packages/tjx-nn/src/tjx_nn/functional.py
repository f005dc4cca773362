"""Models as functions of plain parameters: what a training step works with.

Parameters are nested dicts of arrays. Inside `jax.jit`, `bind` makes a model of them again, which
costs nothing at run time.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tjx_nn.config import TransformerConfig
from tjx_nn.layout import SINGLE_DEVICE, Layout, set_model_layout
from tjx_nn.models.bert import Bert
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit import ViT
from tjx_nn.models.vit_config import ViTConfig
from tjx_nn.sub_configs import raise_problems

Params = dict[str, Any]
Given = Params | nnx.State[Any, Any]
LogicalAxes = dict[str, Any]
Model = GPT | Bert | ViT | EncoderDecoder

# Which model a configuration is of.
_MODELS: dict[type[TransformerConfig], Any] = {
    GPTConfig: GPT,
    BertConfig: Bert,
    ViTConfig: ViT,
    EncoderDecoderConfig: EncoderDecoder,
}


def init(config: TransformerConfig, key: Array) -> Params:
    """Return initial parameters, a nested dict of float32 arrays.

    The values depend on the key alone: with `out_shardings` for any mesh they are the same.

    Parameters
    ----------
    config
        The model; a static argument of `jax.jit`.
    key
        A key made by `jax.random.key`.

    Examples
    --------
    >>> import jax
    >>> from tjx_nn import GPTConfig, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> params["blocks"]["attention"]["query"]["kernel"].shape
    (2, 4, 4)
    """
    params: Params = nnx.to_pure_dict(nnx.state(_make(config, key)))
    return params


@overload
def bind(
    config: GPTConfig, params: Given, *, layout: Layout = ..., n_layer: int | None = ...
) -> GPT: ...


@overload
def bind(
    config: BertConfig, params: Given, *, layout: Layout = ..., n_layer: int | None = ...
) -> Bert: ...


@overload
def bind(
    config: ViTConfig, params: Given, *, layout: Layout = ..., n_layer: int | None = ...
) -> ViT: ...


@overload
def bind(
    config: EncoderDecoderConfig, params: Given, *, layout: Layout = ..., n_layer: int | None = ...
) -> EncoderDecoder: ...


def bind(
    config: TransformerConfig,
    params: Given,
    *,
    layout: Layout = SINGLE_DEVICE,
    n_layer: int | None = None,
) -> Model:
    """Return the model that has these parameters; for use inside `jax.jit`.

    Parameters
    ----------
    config
        The model.
    params
        What `init` returns: the same nested names and shapes, of any floating-point dtype.
    layout
        Where the arrays of the model lie; one device, unless it is told otherwise.
    n_layer
        Blocks that the stacked parameters hold, for a stage of a pipeline; None is all of them.

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
    # nnx.merge assigns leaves in the order of their sorted names, whatever the names are.
    check_params(config, params, n_layer=n_layer)
    model: Model = nnx.merge(_abstract(config)[0], params)
    set_model_layout(model, layout)
    return model


def check_params(config: TransformerConfig, params: Params, *, n_layer: int | None = None) -> None:
    """Compare the names, shapes and dtypes of parameters with those of a configuration's model.

    Works on arrays of any kind: NumPy, sharded, abstract (`jax.ShapeDtypeStruct`) and traced.

    Parameters
    ----------
    config
        The model.
    params
        Nested dicts of arrays. Any floating-point dtype is accepted: layers compute in
        ``config.dtype``.
    n_layer
        As for `bind`.

    Raises
    ------
    ValueError
        With a line for each parameter that is missing, unknown, or has another shape or a dtype
        that is not floating-point.
    """
    given = {
        ".".join(map(_key_name, path)): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]
    }
    expected = param_shapes(config)
    if n_layer is not None:
        expected = {
            path: (n_layer, *shape[1:]) if _is_stacked(path.split(".")) else shape
            for path, shape in expected.items()
        }
    problems = []
    for path, shape in expected.items():
        if path not in given:
            problems.append(f"params {path}: missing; expected shape {list(shape)}")
            continue
        found, dtype = _shape(given[path]), getattr(given[path], "dtype", None)
        if found != shape:
            problems.append(f"params {path}: got {_shown(given[path])}; expected {list(shape)}")
        elif dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            problems.append(f"params {path}: got dtype {dtype}; expected a floating-point dtype")
    problems += [
        f"params {path}: got {_shown(given[path])}; expected no such parameter"
        for path in given
        if path not in expected
    ]
    if problems:
        problems.append(
            f"give the parameters that tjx_nn.init makes for this {type(config).__name__}, or the "
            "configuration that these were made with"
        )
    raise_problems(problems)


@functools.lru_cache(maxsize=64)
def param_shapes(config: TransformerConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path joined by dots; makes no array."""
    flat = nnx.to_flat_state(_abstract(config)[1])
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in flat}


def logical_axes(config: TransformerConfig) -> LogicalAxes:
    """Return the logical name of each axis of each parameter.

    Returns
    -------
    dict
        Nested as the parameters are; a leaf is a tuple with a name for each axis, None for one that
        is never divided. The names are "layers", "vocab", "position" (rows of the tables of
        positions and of token types), "embed", "heads", "kv_heads", "head_dim", "mlp", "expert",
        "latent" and "indexer".

    Examples
    --------
    >>> from tjx_nn import GPTConfig, logical_axes
    >>> logical_axes(GPTConfig())["blocks"]["mlp"]["up"]["kernel"]
    ('layers', 'embed', 'mlp')
    """
    _, state = _abstract(config)
    axes: LogicalAxes = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, leaf = map(str, path)
        node = axes
        for name in parents:
            node = node.setdefault(name, {})
        stacked = ("layers",) if _is_stacked(parents) else ()
        node[leaf] = (*stacked, *variable.get_metadata("logical_axes"))
    return axes


def stack_axes(config: TransformerConfig) -> dict[str, Any]:
    """Return how many leading axes of each parameter stack layers, and experts within a layer.

    What belongs to one layer is what follows these axes: optimizers that look at a whole matrix
    (its norm, its singular values) look at each layer's by itself.

    Returns
    -------
    dict
        Nested as the parameters are; a leaf is an int.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, stack_axes
    >>> depths = stack_axes(GPTConfig())
    >>> depths["blocks"]["mlp"]["up"]["kernel"], depths["wte"]["embedding"]
    (1, 0)
    """

    def depth(axes: tuple[str | None, ...]) -> int:
        # The last axis is what a parameter is about, even where it counts experts (a router's).
        stacked = itertools.takewhile(lambda axis: axis in {"layers", "expert"}, axes[:-1])
        return len(list(stacked))

    depths: dict[str, Any] = jax.tree.map(
        depth, logical_axes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
    return depths


@functools.lru_cache(maxsize=64)
def _abstract(config: TransformerConfig) -> tuple[Any, Any]:
    """Graph definition and abstract state: the model's shape, without any array."""
    return nnx.split(nnx.eval_shape(lambda: _make(config, jax.random.key(0))))


def _is_stacked(path: Sequence[str]) -> bool:
    """Tell whether a parameter has a leading axis for the layers."""
    return any(name.endswith("blocks") for name in path)


def _key_name(key: Any) -> str:
    """Return what a key of a pytree's path is called; lists have numbers."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    shape = getattr(leaf, "shape", None)
    return None if shape is None else tuple(shape)


def _shown(leaf: Any) -> str:
    shape = _shape(leaf)
    return f"a {type(leaf).__name__}" if shape is None else f"shape {list(shape)}"


def _make(config: TransformerConfig, key: Array) -> Model:
    if type(config) not in _MODELS:
        raise ValueError(
            f"config is a {type(config).__name__}: give one of {[k.__name__ for k in _MODELS]}"
        )
    model: Model = _MODELS[type(config)](config, rngs=nnx.Rngs(key))
    return model
