"""Model of a configuration, without allocating its parameters: its structure and logical axes."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from tjx_nn.models.bert import Bert
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit import ViT
from tjx_nn.models.vit_config import ViTConfig
from tjx_nn.registry import registered_models

BUILT_IN_MODELS: dict[type, Callable[..., nnx.Module]] = {
    GPTConfig: GPT,
    BertConfig: Bert,
    ViTConfig: ViT,
    EncoderDecoderConfig: EncoderDecoder,
}


@functools.lru_cache(maxsize=64)
def abstract_model(config: Hashable) -> tuple[Any, Any, list[Any]]:
    """Return the graph definition, abstract parameters and abstract PRNG state of a model."""
    model = nnx.eval_shape(lambda: make_model(config, jax.random.key(0)))
    split: Any = nnx.split(model, nnx.Param, nnx.RngState, ...)
    graph, params, rng_state, other = split
    if other:
        raise ValueError(
            f"config: got a {type(config).__name__} whose model has variables other than "
            "parameters "
            f"({', '.join('.'.join(map(str, path)) for path, _ in nnx.to_flat_state(other))}); "
            "expected nnx.Param variables only; remove the others, such as batch statistics"
        )
    return graph, params, [rng_state] if rng_state else []


def param_axes(config: Hashable) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axes of each parameter by its dotted path, from flax's metadata."""
    axes = {}
    for path, variable in nnx.to_flat_state(abstract_model(config)[1]):
        names = variable.get_metadata("out_sharding", None)
        ndim = variable.get_value().ndim
        axes[".".join(map(str, path))] = (None,) * ndim if names is None else tuple(names)
    return axes


def make_model(config: Hashable, key: Array) -> nnx.Module:
    """Make the model that is registered for a configuration or its nearest base class."""
    models = {**BUILT_IN_MODELS, **registered_models}
    for kind in type(config).__mro__:
        if kind in models:
            model: nnx.Module = models[kind](config, rngs=nnx.Rngs(key))
            return model
    raise ValueError(
        f"config: got a {type(config).__name__}; expected one of "
        f"{[kind.__name__ for kind in models]} or a subclass; add it with tjx_nn.register"
    )
