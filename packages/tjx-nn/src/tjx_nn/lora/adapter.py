"""Low-rank adapter of a linear layer.

Axes in names: I input features, O output features, R rank.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.layers.linear import matmul
from tjx_nn.layout import Layout, ParamSharding, ShardedModule
from tjx_nn.quantization.kernels import QuantizedKernel


class Adapter(ShardedModule):
    """Low-rank adapter of a linear layer: LoRA, with a magnitude DoRA.

    Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".

    Parameters
    ----------
    a, b
        Factors of the change of the kernel.
    magnitude
        Norm of the kernel of each output; None is LoRA.
    scale
        Factor of the change.
    axes
        Logical axes of the kernel.
    layout
        Layout of the model.
    """

    def __init__(
        self,
        a: Float[Array, "*layers I R"],
        b: Float[Array, "*layers R O"],
        magnitude: Float[Array, "*layers O"] | None = None,
        *,
        scale: float,
        axes: tuple[str | None, str | None],
        layout: Layout,
    ) -> None:
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.magnitude = None if magnitude is None else nnx.Param(magnitude)
        self.scale, self.axes, self.layout = scale, axes, layout

    def __call__(
        self,
        x: Float[Array, "*any I"],
        y: Float[Array, "*any O"],
        kernel: Float[Array, "I O"] | QuantizedKernel,
    ) -> Float[Array, "*any O"]:
        """Adapt the output `y` of a layer without its bias.

        The norm of DoRA is a constant in the derivative, as in the paper (section 4.3).
        """
        a, b = self.a[...], self.b[...]
        low = matmul(ParamSharding(self.layout, (self.axes[0], None)), x, a)
        y = y + self.scale * matmul(ParamSharding(self.layout, (None, self.axes[1])), low, b)
        if self.magnitude is None:
            return y
        adapted = kernel.astype(jnp.float32) + self.scale * jnp.matmul(a, b, precision="highest")
        factor: Array = self.magnitude[...] / jax.lax.stop_gradient(column_norms(adapted))
        return y * factor.astype(y.dtype)[(None,) * (y.ndim - 1)]


def column_norms(
    kernel: Float[Array, "*layers I O"] | QuantizedKernel,
) -> Float[Array, "*layers O"]:
    """Return the norm of the weights of each output, float32."""
    norms: Array = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
    return norms
