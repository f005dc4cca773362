"""The layers that models are composed of.

Modules hold parameters only. What is random takes its key when called, and a parameter carries the
logical names of its axes ("embed", "heads", ...) as metadata: which axis of a device mesh each of
them lies on, if any, is the caller's decision.

Axes in names: B batch, T time, S slots of the key-value cache, D d_model, F d_ff, N query heads,
K key-value heads, G query heads a key-value head (N = K * G), H head_dim, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_kernels import flash_attention
from tjx_nn.activations import gelu_erf, gelu_tanh
from tjx_nn.config import GPTConfig
from tjx_nn.matmul import dot_general

# constrain(x, logical names of its axes) -> x: how a caller says where on its mesh x lies.
Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]
# Keys and values of one layer, [batch, time or slots, kv_heads, head_dim] each.
KeysValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]


def _linear(
    config: GPTConfig, axes: tuple[str, str], shape: tuple[int, int], *, std: float, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        *shape,
        use_bias=config.bias,
        dtype=config.dtype,
        param_dtype=jnp.float32,
        kernel_init=normal(std),
        dot_general=dot_general,
        kernel_metadata={"logical_axes": axes},
        bias_metadata={"logical_axes": axes[1:]},
        rngs=rngs,
    )


def _residual_std(config: GPTConfig) -> float:
    """Scale down what writes to the residual stream: 2 * n_layer sublayers add up there."""
    return 0.02 / math.sqrt(2 * config.n_layer)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id.

    The lookup is in float32, so that gradients of frequent ids add up in float32. Ids outside the
    table are clipped to it.
    """

    def __init__(self, num: int, features: int, *, axes: tuple[str, str], rngs: nnx.Rngs) -> None:
        init: Initializer = normal(0.02)
        table = init(rngs.params(), (num, features), jnp.float32)
        self.row_axis = axes[0]
        self.embedding = nnx.Param(table, logical_axes=axes)

    def __call__(
        self, ids: Int[Array, "*any"], *, constrain: Constrain | None = None
    ) -> Float32[Array, "*any D"]:
        """Return the rows of `ids`."""
        return jnp.take(self.table(constrain), ids, axis=0, mode="clip")

    def table(self, constrain: Constrain | None) -> Float32[Array, "rows D"]:
        """Return all rows, their features gathered where they are spread over devices."""
        table = self.embedding[...]
        return table if constrain is None else constrain(table, (self.row_axis, None))


class LayerNorm(nnx.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it.

    Statistics are float32 whatever the input's dtype, and the variance is that of the centred
    values: the cheaper mean of squares cancels badly when the mean is large. Ba et al. 2016, "Layer
    Normalization".
    """

    def __init__(self, features: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        self.eps = eps
        axes = ("embed",)
        self.scale = nnx.Param(jnp.ones(features, jnp.float32), logical_axes=axes)
        shift = nnx.Param(jnp.zeros(features, jnp.float32), logical_axes=axes)
        self.bias = shift if bias else None

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """Return the normalised `x`, in its dtype."""
        bias = None if self.bias is None else self.bias[...]
        y: Array = _normalise(x, self.scale[...], bias, self.eps)
        return y


# Checkpointed: the backward pass keeps x and not the four arrays that are made of it.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _normalise(
    x: Float[Array, "*any D"],
    scale: Float32[Array, " D"],
    bias: Float32[Array, " D"] | None,
    eps: float,
) -> Float[Array, "*any D"]:
    lead = (1,) * (x.ndim - 1)
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps) * scale.reshape(*lead, -1)
    if bias is not None:
        y = y + bias.reshape(*lead, -1)
    return y.astype(x.dtype)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        d, f = config.d_model, config.ff_dim
        self.gelu = gelu_tanh if config.gelu == "tanh" else gelu_erf
        self.up = _linear(config, ("embed", "mlp"), (d, f), std=0.02, rngs=rngs)
        self.down = _linear(config, ("mlp", "embed"), (f, d), std=_residual_std(config), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the transformed `x`."""
        y: Array = self.down(self.gelu(self.up(x)))
        return y


class Attention(nnx.Module):
    """Causal self-attention with as many key-value heads as the config says (MHA, GQA, MQA).

    Query, key and value have a kernel each, so that each can be sharded by whole heads. Vaswani et
    al. 2017, "Attention Is All You Need"; Ainslie et al. 2023, "GQA".
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        self.implementation = config.attention
        d, n, k = config.d_model, config.d_model, config.kv_heads * config.head_dim
        self.query = _linear(config, ("embed", "heads"), (d, n), std=0.02, rngs=rngs)
        self.key = _linear(config, ("embed", "kv_heads"), (d, k), std=0.02, rngs=rngs)
        self.value = _linear(config, ("embed", "kv_heads"), (d, k), std=0.02, rngs=rngs)
        self.out = _linear(config, ("heads", "embed"), (n, d), std=_residual_std(config), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Attend from each position to itself and what comes before it.

        Parameters
        ----------
        x
            Normalised residual stream.
        segment_ids
            Positions attend only to positions of their own segment.

        Returns
        -------
        tuple
            The output, and the keys and values that a cache may keep.
        """
        q_BTNH, k_BTKH, v_BTKH = self._project(x)
        out_BTNH = flash_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            causal=True,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            implementation=self.implementation,
        )
        assert isinstance(out_BTNH, Array)  # and no log-sum-exp with it
        return self.out(out_BTNH.reshape(x.shape)), (k_BTKH, v_BTKH)

    def decode(
        self, x: Float[Array, "B 1 D"], cache: KeysValues, positions: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], KeysValues]:
        """Attend from one new token a row to that row's cached keys and values, and to itself.

        Parameters
        ----------
        x
            Normalised residual stream of the new tokens.
        cache
            Keys and values; slot s of a row holds its position s.
        positions
            The new token's position in each row. Slots beyond it are not looked at.

        Returns
        -------
        tuple
            The output, and the cache with the new tokens' keys and values in it.
        """
        q_B1NH, k_B1KH, v_B1KH = self._project(x)
        rows = jnp.arange(x.shape[0])
        k_BSKH = cache[0].at[rows, positions].set(k_B1KH[:, 0])
        v_BSKH = cache[1].at[rows, positions].set(v_B1KH[:, 0])
        visible_BS = jnp.arange(k_BSKH.shape[1])[None, :] <= positions[:, None]
        out_BNH = _attend_one(q_B1NH[:, 0], k_BSKH, v_BSKH, visible_BS)
        return self.out(out_BNH.reshape(x.shape)), (k_BSKH, v_BSKH)

    def _project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self._split_heads(q), self._split_heads(k), self._split_heads(v)

    def _split_heads(self, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B T N H"]:
        B, T, F = x_BTF.shape
        return x_BTF.reshape(B, T, F // self.head_dim, self.head_dim)


def _attend_one(
    q_BNH: Float[Array, "B N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BS: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """Attention of one query a row and head; its scores are few enough to be held at once."""
    B, N, H = q_BNH.shape
    q_BKGH = q_BNH.reshape(B, k_BSKH.shape[2], -1, H)
    scores_BKGS = jnp.einsum(
        "bkgh,bskh->bkgs", q_BKGH, k_BSKH, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    weights_BKGS = jax.nn.softmax(jnp.where(visible_BS[:, None, None, :], scores_BKGS, -jnp.inf))
    out_BKGH = jnp.einsum("bkgs,bskh->bkgh", weights_BKGS.astype(v_BSKH.dtype), v_BSKH)
    return out_BKGH.reshape(B, N, H)
