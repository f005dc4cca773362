"""The loss of a language model's head without the logits of all tokens in memory."""

import math
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from tjx_kernels.cross_entropy.chunked import chunk_count, head_loss
from tjx_kernels.cross_entropy.stored_logits import head_loss_kept
from tjx_kernels.cross_entropy.terms import CrossEntropyCall, Head
from tjx_kernels.target import Platform, current_target

# Logits of a chunk when no size is given. Small chunks stay in a CPU's cache, which there pays more
# than computing logits twice costs; a GPU wants few large products (2**28 float32 logits: 1 GiB).
# Below MIN_ROWS adding up x's gradient would show.
CHUNK_LOGITS: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**20}
MIN_ROWS = 1024
# On a GPU the logits are kept for the backward pass up to this size on each device.
KEPT_LOGITS_BYTES = 4 * 2**30
# Matrix products of GPUs are fast where the vocabulary is a multiple of this: it is padded to one.
# Below PADDED_FROM rows the padding would be a large part.
ROW_MULTIPLE = 128
PADDED_FROM = 1024


class Options(TypedDict, total=False):
    """The keyword arguments of `linear_cross_entropy`, all but `return_lse`."""

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
    **options: Unpack[Options],
) -> jax.Array: ...


@overload
def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
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
    """Cross-entropy of softmax(x w^T + bias) against labels, for each token, in nats.

    Parameters
    ----------
    x : [..., d_model]
        The last hidden states: float32, bfloat16 or float16. Products are computed in this dtype
        with float32 results; the softmax is float32 (float64 for float64 x).
    w : [vocab, d_model]
        The head, in the layout of a tied embedding table. It may have another floating dtype than
        x, such as float32 masters under bfloat16 activations: chunks are cast as they are used,
        and its gradient is summed in float32 and has w's dtype.
    labels : integers [...]
        One for each token. A label outside the vocabulary that is not `ignore_index` makes the
        token's loss and gradients NaN.
    bias : [vocab]
        Added to the logits, in float32; its gradient is summed in float32.
    vocab_size
        Where w has rows beyond the vocabulary, so that their number suits the machine: only the
        first `vocab_size` count, the others have the probability and the gradient 0. A slice of w
        would be a copy.
    ignore_index
        Tokens with this label have the loss 0 and no gradient through it.
    z_loss
        z_loss * lse^2 is added to each token's loss, with lse the log-sum-exp of its logits, which
        keeps their scale near 0: 1e-4 in PaLM.
    label_smoothing
        From 0 to 1: the target is (1 - label_smoothing) on the label and label_smoothing / vocab
        more on every row of the vocabulary.
    soft_cap
        Logits z become soft_cap * tanh(z / soft_cap).
    return_lse
        Also return the log-sum-exp, to log it or to add a loss of your own.
    chunk_size
        About how many rows of w a chunk has, so that the logits in memory are [..., chunk_size]:
        within a factor of two, the size that divides the vocabulary best. When None, the larger of
        `MIN_ROWS` and what makes the platform's `CHUNK_LOGITS` logits.
    keep_logits
        Whether the forward pass keeps all logits, in x's dtype, for the backward pass instead of
        computing them again in chunks. When None, on GPUs, unless `chunk_size` is given or the
        logits of a device exceed `KEPT_LOGITS_BYTES`. The softmax is computed from the kept logits,
        which with bfloat16 x are rounded to bfloat16.
    token_shards
        Devices that the tokens are divided over, to count the logits of each.

    Returns
    -------
    loss : float32 [...]
        Zero where ignored; sum it and divide by the number of tokens that count.
    lse : float32 [...], only with `return_lse`
        Natural logarithm of the sum of the exponentials of a token's logits, ignored or not;
        differentiable.

    Raises
    ------
    ValueError
        For shapes, dtypes or sizes that do not fit together, one line for each.

    Notes
    -----
    Differentiable in reverse mode only. The logits' gradients are rounded to x's dtype: with
    float16, whose small numbers vanish, scale the loss. For w spread over devices by rows, a number
    of rows that is a multiple of many small numbers (50304 rather than 50257: see `vocab_size`)
    lets each device keep to its own rows.

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
        *_array_problems(x, w, labels, bias),
        *_vocab_problems(w, vocab_size),
        *_option_problems(z_loss, label_smoothing, soft_cap, chunk_size),
        *_keep_problems(keep_logits, chunk_size, token_shards),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    vocab_size = w.shape[0] if vocab_size is None else vocab_size
    platform = current_target().platform
    tokens = max(1, labels.size // token_shards)
    if keep_logits is None:
        kept_bytes = tokens * w.shape[0] * x.dtype.itemsize
        keep_logits = platform == "gpu" and chunk_size is None and kept_bytes <= KEPT_LOGITS_BYTES
    if keep_logits or platform == "gpu":
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
    compute = head_loss_kept if keep_logits else head_loss
    loss, lse = compute(call, x, Head(w, bias), labels.astype(jnp.int32))
    return (loss, lse) if return_lse else loss


def _padded(rows: jax.Array) -> jax.Array:
    """Append rows of zeros up to a multiple of `ROW_MULTIPLE`, where there are many."""
    count = rows.shape[0]
    pad = -count % ROW_MULTIPLE if count >= PADDED_FROM else 0
    return jnp.pad(rows, ((0, pad), *[(0, 0)] * (rows.ndim - 1)))


def _array_problems(
    x: jax.Array, w: jax.Array, labels: jax.Array, bias: jax.Array | None
) -> list[str]:
    problems = []
    if x.ndim < 1 or w.ndim != 2 or w.shape[1:] != x.shape[-1:] or 0 in w.shape:
        problems.append(
            f"x has shape {x.shape} and w {w.shape}; "
            "they must be [..., d_model] and [vocab, d_model], none of w's axes 0"
        )
    elif labels.shape != x.shape[:-1]:
        problems.append(
            f"labels has shape {labels.shape}; it must be x's without the last axis: {x.shape[:-1]}"
        )
    if bias is not None and bias.shape != w.shape[:1]:
        problems.append(f"bias has shape {bias.shape}; it must be one number a row of w")
    problems += [
        f"{name} is {array.dtype}; it must be floating: cast it first"
        for name, array in (("x", x), ("w", w), ("bias", bias))
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        problems.append(f"labels is {labels.dtype}; it must be integers, such as int32")
    return problems


def _vocab_problems(w: jax.Array, vocab_size: int | None) -> list[str]:
    if vocab_size is None or (w.ndim and 1 <= vocab_size <= w.shape[0]):
        return []
    return [f"vocab_size is {vocab_size} and w has shape {w.shape}; give 1 to w's number of rows"]


def _option_problems(
    z_loss: float, label_smoothing: float, soft_cap: float | None, chunk_size: int | None
) -> list[str]:
    problems = []
    if not (math.isfinite(z_loss) and z_loss >= 0):
        problems.append(f"z_loss is {z_loss}; it must be finite and at least 0, such as 1e-4")
    if not 0 <= label_smoothing <= 1:
        problems.append(f"label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        problems.append(f"soft_cap is {soft_cap}; it must be finite and > 0: give None for no cap")
    if chunk_size is not None and chunk_size < 1:
        problems.append(f"chunk_size is {chunk_size}; it counts rows of w: give 1 or more, or None")
    return problems


def _keep_problems(
    keep_logits: bool | None, chunk_size: int | None, token_shards: int
) -> list[str]:
    problems = []
    if keep_logits and chunk_size is not None:
        problems.append(
            f"keep_logits: got True with chunk_size {chunk_size}; expected one of them; leave "
            "chunk_size out, as logits that are kept are not computed in chunks"
        )
    if token_shards < 1:
        problems.append(
            f"token_shards: got {token_shards}; expected 1 or more; give the number of devices "
            "that the tokens are divided over"
        )
    return problems
