"""An attention call: its static part, its arrays, its mask, and the validation of its arguments.

`AttentionCall` is hashable, so a backend can decide from it alone whether it supports the call and
can be compiled for it. `Operands` holds the arrays.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tjx_kernels.attention import dropout, option_checks
from tjx_kernels.attention.mask_functions import MaskMod, split_mask
from tjx_kernels.attention.option_checks import Shaped
from tjx_kernels.target import Platform, current_target, deterministic_ops


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
    causal, window, symmetric_window, soft_cap, scale, dropout_rate
        Arguments of `flash_attention`; `scale` is resolved to a number.
    segment_ids, alibi
        Whether the call has segment ids and ALiBi slopes.
    bias
        Sizes of the bias along batch and heads; None without a bias.
    q_offset
        Position of the first query; None if it is a traced array.
    mask
        Elementwise function of the indices that masks keys besides the other masks, or None; other
        masks are part of the bias.
    return_lse
        Whether the caller requests the log-sum-exp (LSE) or sinks need it; it is differentiable.
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
    symmetric_window: bool = False
    mask: MaskMod | None = None

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of scores, softmax and LSE: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def is_empty(self) -> bool:
        """Whether batch, q_len or kv_len is 0; such a call never reaches a backend."""
        return self.batch == 0 or self.q_len == 0 or self.kv_len == 0

    @property
    def lookahead(self) -> int | None:
        """Number of keys after its own position that a query attends to; None is unlimited."""
        if self.causal:
            return 0
        return self.window - 1 if self.symmetric_window and self.window is not None else None

    @property
    def group(self) -> int:
        """Query heads per key head: query head n attends to key head n // group."""
        return self.heads // self.kv_heads


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


DTYPES = ("float32", "bfloat16", "float16", "float64")


def bind_arguments(
    q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any
) -> tuple[AttentionCall, Operands]:
    """Validate the arguments of `flash_attention` and split them into static part and arrays.

    Raises
    ------
    ValueError
        As `describe_call`, and if the mask is invalid.
    """
    if mask is not None and q.ndim == k.ndim == 4:  # otherwise describe_call raises
        given = {name: options[name] for name in ("q_offset", "bias") if name in options}
        mask, options["bias"] = split_mask(mask, q, k, **given)
    call = describe_call(q, k, v, mask=mask, **options)
    offset = slopes = seed = None
    if call.q_offset is None:
        offset = jnp.broadcast_to(options["q_offset"].astype(jnp.int32), (call.batch,))
    if call.alibi:
        slopes = options["alibi_slopes"].astype(jnp.float32)
        slopes = jnp.broadcast_to(slopes.reshape(-1, call.heads), (call.batch, call.heads))
    if call.dropout_rate:
        seed = dropout.seeds(options["dropout_key"], call.batch)
    q_ids, kv_ids = (
        None if (x := options.get(name)) is None else x.astype(jnp.int32)
        for name in ("q_segment_ids", "kv_segment_ids")
    )
    return call, Operands(q, k, v, q_ids, kv_ids, offset, options.get("bias"), slopes, seed)


def describe_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    window: int | None = None,
    symmetric_window: bool = False,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: Any = 0,
    bias: Any = None,
    mask: MaskMod | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> AttentionCall:
    """Validate the arguments of `flash_attention` and return the static part of the call.

    Every array may be a `jax.ShapeDtypeStruct`. `mask` is a function from `split_mask`.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """
    # Ranks first: the other checks index the axes.
    _raise_all(
        [
            f"{name}: got shape {x.shape}; expected [batch, length, heads, head_dim]; reshape it"
            for name, x in (("q", q), ("k", k), ("v", v))
            if x.ndim != 4
        ]
    )
    problems: list[str] = []
    # Tracers have no devices, and uncommitted arrays follow the others.
    committed = {
        name: x.devices()
        for name, x in {"q": q, "k": k, "v": v, "bias": bias}.items()
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    }
    if committed:
        problems += option_checks.device_problems(committed)
    problems += _shape_problems(q, k, v)
    problems += _score_problems(causal, window, symmetric_window, soft_cap, scale)
    if q_segment_ids is not None or kv_segment_ids is not None:
        problems += option_checks.segment_problems(q, k, q_segment_ids, kv_segment_ids)
    if bias is not None:
        problems += option_checks.bias_problems(q, k, bias)
    if alibi_slopes is not None:
        problems += option_checks.slope_problems(q, alibi_slopes)
    if sinks is not None:
        problems += option_checks.sink_problems(q, sinks)
    if not isinstance(q_offset, int):
        problems += option_checks.offset_problems(q, q_offset)
    if dropout_rate != 0:
        problems += option_checks.dropout_problems(dropout_rate, dropout_key)
    _raise_all(problems)
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads, v_head_dim = v.shape[1:]
    target = current_target()
    return AttentionCall(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=jnp.dtype(q.dtype).name,
        causal=causal,
        window=window,
        symmetric_window=symmetric_window,
        soft_cap=soft_cap,
        scale=head_dim**-0.5 if scale is None else float(scale),
        dropout_rate=float(dropout_rate),
        segment_ids=q_segment_ids is not None,
        alibi=alibi_slopes is not None,
        bias=None if bias is None else bias.shape[:2],
        q_offset=q_offset if isinstance(q_offset, int) else None,
        return_lse=return_lse or sinks is not None,
        platform=target.platform,
        architecture=target.architecture,
        interpret=interpret,
        deterministic=deterministic_ops(),
        mask=mask,
    )


def _shape_problems(q: Shaped, k: Shaped, v: Shaped) -> Iterator[str]:
    heads, kv_heads = q.shape[2], k.shape[2]
    if k.shape[:3] != v.shape[:3]:
        yield (
            f"v: got shape {v.shape} with k {k.shape}; expected the same axes except the last, "
            "head_dim; correct one of them"
        )
    if k.shape[0] != q.shape[0]:
        yield (
            f"k: got batch {k.shape[0]} with q {q.shape[0]}; expected the same; correct one of them"
        )
    if k.shape[3] != q.shape[3]:
        yield (
            f"k: got head_dim {k.shape[3]} with q {q.shape[3]}; expected the same; correct one of "
            "them"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        yield "head_dim: got 0; expected 1 or more; correct the last axis of q, k and v"
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        yield (
            f"q: got {heads} heads with {kv_heads} in k; expected a multiple of kv_heads, both 1 "
            "or more; correct one of them"
        )
    dtypes = [jnp.dtype(x.dtype).name for x in (q, k, v)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        yield (
            f"q, k, v: got dtypes {', '.join(dtypes)}; expected one of {', '.join(DTYPES)} for all "
            "three; cast them first"
        )


def _score_problems(
    causal: bool, window: int | None, symmetric: bool, soft_cap: float | None, scale: float | None
) -> Iterator[str]:
    if window is not None and window < 1:
        yield (
            f"window: got {window}; expected the number of keys that a query attends to, its own "
            "included; give 1 or more, or None"
        )
    if symmetric and (causal or window is None):
        yield "symmetric_window: got True; expected a window without a causal mask; leave it out"
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        yield f"soft_cap: got {soft_cap}; expected a finite number > 0; give None for no cap"
    if scale is not None and not math.isfinite(scale):
        yield f"scale: got {scale}; expected a finite number; give None for 1 / sqrt(head_dim)"


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def make_mask(
    call: AttentionCall,
    position: Any,
    key: Any,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
    *,
    batch: Any = None,
    head: Any = None,
) -> jax.Array | None:
    """Return the causal, window and segment mask and that of `call.mask`, True for visible keys.

    None means that nothing is masked. Query positions, key indices, segment ids, and the batch and
    head indices, which only `call.mask` reads, are arrays that broadcast against each other. The
    caller masks keys past the end of the sequence.
    """
    masks = []
    if call.causal:
        masks.append(key <= position)
    if call.window is not None:
        masks.append(key > position - call.window)
        if call.symmetric_window:
            masks.append(key < position + call.window)
    if q_ids is not None and kv_ids is not None:
        masks.append(q_ids == kv_ids)
    if call.mask is not None:
        masks.append(call.mask(batch, head, position, key))
    return reduce(jnp.logical_and, masks) if masks else None
