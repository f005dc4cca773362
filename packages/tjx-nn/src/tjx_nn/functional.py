"""Models as functions of plain parameters: what a training step works with.

Parameters are nested dicts of arrays. Inside `jax.jit`, `bind` makes a model of them again, which
costs nothing at run time.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from tjx_nn.config import GPTConfig
from tjx_nn.gpt import GPT
from tjx_nn.layers import Constrain

Params = dict[str, Any]
LogicalAxes = dict[str, Any]


def init(config: GPTConfig, key: Array) -> Params:
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
    params: Params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key))))
    return params


def bind(config: GPTConfig, params: Params, *, constrain: Constrain | None = None) -> GPT:
    """Return the model that has these parameters; for use inside `jax.jit`.

    Parameters
    ----------
    config
        The model.
    params
        What `init` returns.
    constrain
        Where the model runs on several devices: `constrain(x, logical_axes) -> x` says how an array
        is spread over them, as `jax.lax.with_sharding_constraint` does. It is called with the
        residual stream, ("batch", "seq", "embed"), where the batch is to be spread rather than the
        width, and with tables that are looked up in, ("vocab", None) and ("seq", None).

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
    model: GPT = nnx.merge(_abstract(config)[0], params)
    model.constrain = constrain
    return model


def logical_axes(config: GPTConfig) -> LogicalAxes:
    """Return the logical name of each axis of each parameter.

    Returns
    -------
    dict
        Nested as the parameters are; a leaf is a tuple with a name for each axis. The names are
        "layers", "vocab", "seq" (rows of the position table), "embed", "heads", "kv_heads" and
        "mlp".

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
        stacked = ("layers",) if path[0] == "blocks" else ()
        node[leaf] = (*stacked, *variable.get_metadata("logical_axes"))
    return axes


@functools.lru_cache(maxsize=64)
def _abstract(config: GPTConfig) -> tuple[Any, Any]:
    """Graph definition and abstract state: the model's shape, without any array."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(jax.random.key(0)))))
