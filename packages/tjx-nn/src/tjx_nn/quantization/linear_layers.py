"""Linear layers of a model by name, for adapters and quantization."""

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import NamedTuple

import jax
from flax import nnx

from tjx_nn.binding import param_shapes
from tjx_nn.layers.linear import Linear
from tjx_nn.models.abstract_model import make_model, param_axes


class LinearLayer(NamedTuple):
    """Shape and logical axes of a linear layer's kernel; leading ones stack layers."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@lru_cache(maxsize=64)
def linear_layers(config: Hashable) -> Mapping[str, LinearLayer]:
    """Return every linear layer of a model by dotted path."""
    model = nnx.eval_shape(lambda: make_model(config, jax.random.key(0)))
    shapes, axes = param_shapes(config), param_axes(config)
    paths = [
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    ]
    return {
        path: LinearLayer(shapes[f"{path}.kernel"], axes[f"{path}.kernel"])
        for path in sorted(paths)
    }


def block_kernels(config: Hashable) -> frozenset[str]:
    """Return the dotted paths of the kernels of linear layers in stacked blocks."""
    layers = linear_layers(config).items()
    return frozenset(f"{path}.kernel" for path, layer in layers if layer.axes[0] == "layers")
