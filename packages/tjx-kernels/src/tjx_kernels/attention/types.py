"""What passes between the public functions and an implementation of attention.

`AttentionCall` is everything static about a call: hashable, so that an implementation can say from
it alone whether it can serve, and be compiled for it. `Operands` are its arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tjx_kernels.target import Platform


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The static part of one attention call.

    Attributes
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim, v_head_dim
        Sizes of q [batch, q_len, heads, head_dim], k [batch, kv_len, kv_heads, head_dim] and
        v [batch, kv_len, kv_heads, v_head_dim].
    dtype
        Name of the dtype of q, k and v.
    causal, window, soft_cap, scale, dropout_rate
        As given to `flash_attention`; `scale` is resolved.
    segment_ids, alibi
        Whether segment ids and ALiBi slopes are given.
    bias
        The bias's sizes along batch and heads, or None without a bias.
    q_offset
        Position of the first query, or None where it is known only when the program runs.
    return_lse
        Whether the caller wants the log-sum-exp, and may differentiate it.
    platform, architecture
        What the program is compiled for, as in `target.Target`.
    interpret
        Whether a Pallas kernel is interpreted on the CPU rather than compiled.
    deterministic
        Whether XLA_FLAGS ask for the same bits in every run, as in `target.deterministic_ops`.
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
        """The dtype of scores, softmax and LSE: float32, for float64 inputs float64."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def nothing_to_see(self) -> bool:
        """Whether an axis has the length 0: all rows are dead, and no implementation is asked."""
        return self.batch == 0 or self.q_len == 0 or self.kv_len == 0

    @property
    def group(self) -> int:
        """How many query heads share a key head: n, ..., n + group - 1 share n // group."""
        return self.heads // self.kv_heads


# A call without options, which every implementation supports on its own devices.
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
    """The arrays of a call, checked, in the public layout, no axis of length 0.

    Attributes
    ----------
    q, k, v
        [batch, q_len, heads, head_dim], [batch, kv_len, kv_heads, head_dim] and
        [batch, kv_len, kv_heads, v_head_dim] in the call's dtype.
    q_segment_ids, kv_segment_ids
        int32 [batch, q_len] and [batch, kv_len], or None.
    q_offset
        int32 [batch] where the call's `q_offset` is None, else None.
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
    """What arrives at the backward pass for each query row.

    Attributes
    ----------
    dout
        [batch, q_len, heads, v_head_dim] in the call's dtype; 0 for dead rows.
    lse
        Accumulator's dtype [batch, heads, q_len], natural logarithm; 0 for dead rows, whose scores
        are all -inf, so that exp(score - lse) is 0 and not NaN.
    delta
        Accumulator's dtype [batch, heads, q_len]: rowsum(out * dout) - dlse.
    """

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Gradients, each with its operand's shape and dtype; `bias` None without a bias."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


# out [batch, q_len, heads, v_head_dim] in the call's dtype and LSE [batch, heads, q_len] in the
# accumulator's: 0 and -inf for rows that see no key.
type Forward = Callable[[AttentionCall, Operands], tuple[jax.Array, jax.Array]]
type Backward = Callable[[AttentionCall, Operands, BackwardInputs], Gradients]


class AttentionBackend(NamedTuple):
    """One way to compute attention.

    Attributes
    ----------
    run
        The differentiable function.
    backward
        The backward pass alone, given the LSE and delta of whole rows: ring attention calls it
        with a part of the keys. None where the implementation cannot give it.
    supports
        None where a call can be served, otherwise the reason why not, in words that complete
        "implementation X cannot serve this call: ...".
    """

    run: Forward
    backward: Backward | None
    supports: Callable[[AttentionCall], str | None]
