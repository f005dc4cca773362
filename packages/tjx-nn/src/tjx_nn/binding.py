"""Models as pure functions of parameters: `bind`, and the check of the parameters.

Parameters are nested dicts of arrays. `bind` makes a model of them inside of `jax.jit`, at no cost
at run time.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from tjx_nn.layout import SINGLE_DEVICE, Layout, set_model_layout
from tjx_nn.models.abstract_model import abstract_model, param_axes
from tjx_nn.models.bert import Bert
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit import ViT
from tjx_nn.models.vit_config import ViTConfig
from tjx_nn.problems import raise_problems
from tjx_nn.quantization.kernels import QuantizedKernel

Params = dict[str, Any]
ParamTree = Params | nnx.State[Any, Any]


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

    Returns
    -------
    flax.nnx.Module
        The model; its parameters are those given.

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
    graph, _, rest = abstract_model(config)
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
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, QuantizedKernel))
    given = {".".join(map(_key_name, path)): leaf for path, leaf in leaves}
    expected = param_shapes(config)
    if n_layer is not None:
        stacked = {path for path, axes in param_axes(config).items() if axes[:1] == ("layers",)}
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
    flat = nnx.to_flat_state(abstract_model(config)[1])
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in flat}


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
