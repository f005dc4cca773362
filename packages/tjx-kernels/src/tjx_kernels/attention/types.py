"""Types shared by the attention API and its backends.

`AttentionCall` holds the static part of a call: it is hashable, so a backend can decide from it
alone whether it supports the call and can be compiled for it. `Operands` holds the arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tjx_kernels.target import Platform


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Static part of an attention call: shapes, dtype, masks, options and target device.

    Attributes
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim, v_head_dim
        Sizes of q [batch, q_len, heads, head_dim], k [batch, kv_len, kv_heads, head_dim] and
        v [batch, kv_len, kv_heads, v_head_dim].
    dtype
        Name of the dtype of q, k and v.
    causal, window, soft_cap, scale, dropout_rate
        Arguments of `flash_attention`; `scale` is resolved to a number.
    segment_ids, alibi
        Whether the call has segment ids and ALiBi slopes.
    bias
        Sizes of the bias along batch and heads; None without a bias.
    q_offset
        Position of the first query; None if it is a traced array.
    return_lse
        Whether the caller requests the log-sum-exp (LSE) and may differentiate it.
    platform, architecture
        Target device, as in `target.Target`.
    interpret
        Whether to run a Pallas kernel in JAX's interpreter on the CPU.
    deterministic
        Whether XLA_FLAGS request bitwise reproducible results, as in `target.deterministic_ops`.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    dropout_rate: float
    segment_ids: bool
    alibi: bool
    bias: tuple[int, int] | None
    q_offset: int | None
    return_lse: bool
    platform: Platform
    architecture: str
    interpret: bool
    deterministic: bool = False

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of scores, softmax and LSE: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def is_empty(self) -> bool:
        """Whether batch, q_len or kv_len is 0; such a call never reaches a backend."""
        return self.batch == 0 or self.q_len == 0 or self.kv_len == 0

    @property
    def group(self) -> int:
        """Query heads per key head: query head n attends to key head n // group."""
        return self.heads // self.kv_heads


# A causal call without further options. Every backend supports it on its own platforms.
PLAIN = AttentionCall(
    batch=2,
    q_len=1024,
    kv_len=1024,
    heads=8,
    kv_heads=8,
    head_dim=64,
    v_head_dim=64,
    dtype="bfloat16",
    causal=True,
    window=None,
    soft_cap=None,
    scale=0.125,
    dropout_rate=0.0,
    segment_ids=False,
    alibi=False,
    bias=None,
    q_offset=0,
    return_lse=False,
    platform="cpu",
    architecture="",
    interpret=False,
)


class Operands(NamedTuple):
    """Arrays of an attention call, validated, in the public layout; no axis has length 0.

    Attributes
    ----------
    q, k, v
        [batch, q_len, heads, head_dim], [batch, kv_len, kv_heads, head_dim] and
        [batch, kv_len, kv_heads, v_head_dim] in the call's dtype.
    q_segment_ids, kv_segment_ids
        int32 [batch, q_len] and [batch, kv_len], or None.
    q_offset
        int32 [batch] if the call's `q_offset` is None, else None.
    bias
        Floating [batch or 1, heads or 1, q_len, kv_len], or None.
    alibi_slopes
        float32 [batch, heads], or None.
    dropout_seed
        uint32 [batch, 2], or None without dropout.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    q_offset: jax.Array | None = None
    bias: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    dropout_seed: jax.Array | None = None


class BackwardInputs(NamedTuple):
    """Inputs of the backward pass for each query row, besides the operands.

    Attributes
    ----------
    dout
        [batch, q_len, heads, v_head_dim] in the call's dtype; 0 for dead rows.
    lse
        [batch, heads, q_len] in the accumulator's dtype, natural logarithm. 0 for dead rows: their
        scores are all -inf, so exp(score - lse) is 0 and not NaN.
    delta
        [batch, heads, q_len] in the accumulator's dtype: rowsum(out * dout) - dlse.
    """

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Gradients of q, k, v and the bias with their operands' shapes and dtypes.

    `bias` is None if the call has no bias.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


# Returns out [batch, q_len, heads, v_head_dim] in the call's dtype and the LSE [batch, heads,
# q_len] in the accumulator's dtype: 0 and -inf for rows that attend to no key.
type Forward = Callable[[AttentionCall, Operands], tuple[jax.Array, jax.Array]]
type Backward = Callable[[AttentionCall, Operands, BackwardInputs], Gradients]


def supports_every_call(call: AttentionCall) -> str | None:
    """Support every call, except a request to interpret a Pallas kernel."""
    return "it is not a Pallas kernel: leave out interpret" if call.interpret else None


class AttentionBackend(NamedTuple):
    """One implementation of attention; `register_backend` adds one to `flash_attention`.

    Attributes
    ----------
    run
        Differentiable function of the call and its operands that returns the output and the LSE.
        `custom_vjp.with_custom_vjp` makes one from a forward and a backward pass.
    supports
        Returns None for a supported call, otherwise the reason, in words that complete
        "implementation X cannot serve this call: ...". It sees shapes and options only.
    backward
        Backward pass that takes the LSE and delta of whole rows and a part of the keys, as ring
        attention needs it; None if the backend has none.
    platforms
        Platforms on which automatic selection considers the backend ("cpu", "gpu", "tpu"); None
        for all. A call with `interpret=True` ignores it.
    """

    run: Forward
    supports: Callable[[AttentionCall], str | None] = supports_every_call
    backward: Backward | None = None
    platforms: tuple[Platform, ...] | None = None
