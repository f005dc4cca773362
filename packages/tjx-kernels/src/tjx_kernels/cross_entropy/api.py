"""Fused output projection and cross-entropy of a language model: `linear_cross_entropy`."""

import math
from collections.abc import Iterator
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from tjx_kernels.cross_entropy.chunked import chunk_count, chunked_loss
from tjx_kernels.cross_entropy.stored_logits import CrossEntropyCall, Head, stored_logits_loss
from tjx_kernels.target import Platform, current_target

# Default logits per chunk. Small chunks fit a CPU's cache, which outweighs the cost of recomputing
# logits; a GPU needs few large products (2**28 float32 logits: 1 GiB). Below MIN_ROWS rows the
# accumulation of x's gradient dominates.
CHUNK_LOGITS: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**20}
MIN_ROWS = 1024
# The forward pass stores the logits for the backward pass up to this size per device.
KEPT_LOGITS_BYTES: dict[Platform, int] = {"cpu": 2**27, "gpu": 2**32, "tpu": 0}
# GPU matrix products are fast for a vocabulary that is a multiple of this; it is padded to one.
# Below PADDED_FROM rows the padding would dominate.
ROW_MULTIPLE = 128
PADDED_FROM = 1024


class CrossEntropyOptions(TypedDict, total=False):
    """Keyword arguments of `linear_cross_entropy`, without `return_lse`."""

    bias: jax.Array | None
    vocab_size: int | None
    ignore_index: int
    z_loss: float
    label_smoothing: float
    soft_cap: float | None
    chunk_size: int | None
    keep_logits: bool | None
    token_shards: int


@overload
def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[CrossEntropyOptions],
) -> jax.Array: ...


@overload
def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[jax.Array, jax.Array]: ...


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    return_lse: bool = False,
    chunk_size: int | None = None,
    keep_logits: bool | None = None,
    token_shards: int = 1,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute the cross-entropy of softmax(x w^T + bias) per token, without storing all logits.

    Parameters
    ----------
    x : [..., d_model]
        Hidden states: float32, bfloat16 or float16. Products take this dtype and accumulate in
        float32; the softmax is float32 (float64 for float64 x).
    w : [vocab, d_model]
        Output projection in the layout of a tied embedding table. Its floating dtype may differ
        from x's (float32 parameters, bfloat16 activations): each chunk is cast to x's dtype, and
        the gradient is accumulated in float32 and returned in w's dtype.
    labels : integers [...]
        Target of each token. A label outside the vocabulary other than `ignore_index` makes the
        token's loss and gradients NaN.
    bias : [vocab]
        Added to the logits in float32; its gradient is accumulated in float32.
    vocab_size
        Vocabulary size if w is padded to more rows: the rows beyond it have probability and
        gradient 0. Avoids the copy that slicing w would make.
    ignore_index
        Tokens with this label have loss 0 and contribute no gradient.
    z_loss
        Adds z_loss * lse^2 to each token's loss, where lse is the log-sum-exp of its logits; keeps
        lse near 0. PaLM uses 1e-4.
    label_smoothing
        From 0 to 1: the target distribution is (1 - label_smoothing) on the label plus
        label_smoothing / vocab_size on every token of the vocabulary.
    soft_cap
        Logits z become soft_cap * tanh(z / soft_cap).
    return_lse
        Also return the log-sum-exp, for logging or additional losses.
    chunk_size
        Approximate rows of w per chunk, so that [..., chunk_size] logits are in memory. The actual
        size is within a factor of two, preferably a divisor of the rows. None is the larger of
        `MIN_ROWS` and the size that gives the platform's `CHUNK_LOGITS` logits.
    keep_logits
        Whether the forward pass stores all logits in x's dtype for the backward pass instead of
        recomputing them in chunks. None stores them on GPUs, and for float32 x on a single CPU
        device, unless `chunk_size` is given or the logits of a device exceed the platform's
        `KEPT_LOGITS_BYTES`. The softmax is computed from the stored logits, which are bfloat16 for
        bfloat16 x.
    token_shards
        Number of devices that shard the tokens, to compute the logits per device.

    Returns
    -------
    loss : float32 [...]
        In nats, 0 for ignored tokens. For the mean, divide the sum by the number of other tokens.
    lse : float32 [...], only with `return_lse`
        Natural logarithm of the sum of the exponentials of a token's logits, for ignored tokens
        too; differentiable.

    Raises
    ------
    ValueError
        For invalid shapes, dtypes or options, one line each.

    Notes
    -----
    Differentiable in reverse mode only. Gradients of the logits are rounded to x's dtype: use loss
    scaling with float16. If devices shard the rows of w, pad w to a number of rows with many small
    divisors (50304 rather than 50257, see `vocab_size`), so that each chunk is evenly sharded.

    References
    ----------
    Chunks of the vocabulary: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models", 2024, section 4. z_loss: de Brébisson and Vincent, "The Z-loss", 2016; Chowdhery et
    al., "PaLM", 2022, section 5. label_smoothing: Szegedy et al., "Rethinking the Inception
    Architecture for Computer Vision", 2016, section 7. soft_cap: "Gemma 2", 2024, section 2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((2, 3, 8)), jnp.zeros((16, 8))
    >>> loss = linear_cross_entropy(x, w, jnp.full((2, 3), -100).at[0, 0].set(5))
    >>> print(jnp.round(loss, 4))
    [[2.7726 0.     0.    ]
     [0.     0.     0.    ]]
    """
    problems = [
        *_array_problems(x, w, labels, bias, vocab_size),
        *_number_problems(z_loss, label_smoothing, soft_cap, token_shards),
        *_chunk_problems(chunk_size, keep_logits),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    vocab_size = w.shape[0] if vocab_size is None else vocab_size
    platform = current_target().platform
    tokens = max(1, labels.size // token_shards)
    pad = platform == "gpu" or bool(keep_logits)
    if keep_logits is None:
        kept_bytes = tokens * w.shape[0] * x.dtype.itemsize
        fits = chunk_size is None and kept_bytes <= KEPT_LOGITS_BYTES[platform]
        # Several CPU devices share the memory of the process.
        keep_logits = fits and (
            platform != "cpu" or (x.dtype == jnp.float32 and jax.device_count() == 1)
        )
    if pad:
        w, bias = _padded(w), None if bias is None else _padded(bias)
    rows = w.shape[0]
    if chunk_size is None:
        chunk_size = max(MIN_ROWS, CHUNK_LOGITS[platform] // tokens)
    call = CrossEntropyCall(
        chunks=0 if keep_logits else chunk_count(rows, min(chunk_size, rows)),
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        soft_cap=soft_cap,
    )
    compute = stored_logits_loss if keep_logits else chunked_loss
    loss, lse = compute(call, x, Head(w, bias), labels.astype(jnp.int32))
    return (loss, lse) if return_lse else loss


def _padded(rows: jax.Array) -> jax.Array:
    """Pad with zero rows to a multiple of `ROW_MULTIPLE`, from `PADDED_FROM` rows on."""
    count = rows.shape[0]
    pad = -count % ROW_MULTIPLE if count >= PADDED_FROM else 0
    return jnp.pad(rows, ((0, pad), *[(0, 0)] * (rows.ndim - 1)))


def _array_problems(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None,
    vocab_size: int | None,
) -> Iterator[str]:
    if x.ndim < 1 or w.ndim != 2 or w.shape[1:] != x.shape[-1:] or 0 in w.shape:
        yield (
            f"x, w: got shapes {x.shape} and {w.shape}; expected [..., d_model] and "
            "[vocab, d_model], no axis of w 0; correct one of them"
        )
    elif labels.shape != x.shape[:-1]:
        yield (
            f"labels: got shape {labels.shape}; expected x's without the last axis, "
            f"{x.shape[:-1]}; reshape them"
        )
    if bias is not None and bias.shape != w.shape[:1]:
        yield (
            f"bias: got shape {bias.shape}; expected one number per row of w, {w.shape[:1]}; "
            "reshape it"
        )
    for name, array in (("x", x), ("w", w), ("bias", bias)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            yield f"{name}: got {array.dtype}; expected a floating dtype; cast it first"
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        yield f"labels: got {labels.dtype}; expected integers; cast them to int32"
    if vocab_size is not None and not (w.ndim and 1 <= vocab_size <= w.shape[0]):
        yield f"vocab_size: got {vocab_size} with w {w.shape}; expected 1 to w's rows; correct it"


def _number_problems(
    z_loss: float, label_smoothing: float, soft_cap: float | None, token_shards: int
) -> Iterator[str]:
    if not (math.isfinite(z_loss) and z_loss >= 0):
        yield f"z_loss: got {z_loss}; expected a finite number >= 0; give 1e-4 or 0"
    if not 0 <= label_smoothing <= 1:
        yield f"label_smoothing: got {label_smoothing}; expected a number from 0 to 1; correct it"
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        yield f"soft_cap: got {soft_cap}; expected a finite number > 0; give None for no cap"
    if token_shards < 1:
        yield (
            f"token_shards: got {token_shards}; expected 1 or more; give the number of devices "
            "that shard the tokens"
        )


def _chunk_problems(chunk_size: int | None, keep_logits: bool | None) -> Iterator[str]:
    if chunk_size is not None and chunk_size < 1:
        yield (
            f"chunk_size: got {chunk_size}; expected a number of rows of w; give 1 or more, or None"
        )
    if keep_logits and chunk_size is not None:
        yield (
            f"keep_logits: got True with chunk_size {chunk_size}; expected one of them, as stored "
            "logits are not computed in chunks; leave out chunk_size"
        )
