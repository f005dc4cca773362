"""Learned bias of attention scores for the relative position of query and key (T5).

Axes in names: B batch, T queries, S keys, N heads, R buckets.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float32, Int

from tjx_nn.layout import ShardedModule, make_param


class RelativeBias(ShardedModule):
    """Bias of each head for each bucket of relative positions, shared by all blocks of a stack.

    Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", section 2.1.

    Parameters
    ----------
    heads
        Number of query heads.
    buckets
        Number of buckets.
    max_distance
        Distance from which on all positions share a bucket, in tokens.
    causal
        Whether no key follows its query: otherwise half of the buckets are for later keys.
    std
        Standard deviation of the normal initializer.
    rngs
        Source of random initial values.

    Examples
    --------
    >>> bias = RelativeBias(2, 8, 16, causal=True, rngs=nnx.Rngs(0))
    >>> bias(jnp.arange(3)[None], jnp.arange(5)[None]).shape
    (1, 2, 3, 5)
    """

    def __init__(
        self,
        heads: int,
        buckets: int,
        max_distance: int,
        *,
        causal: bool,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ) -> None:
        self.causal, self.count, self.axes = causal, buckets, ("position", "heads")
        one_side = buckets if causal else buckets // 2
        self.bucket_of_distance = tuple(distance_buckets(one_side, max_distance))
        values = normal(std)(rngs.params(), (buckets, heads), jnp.float32)
        self.embedding = make_param(values, self.axes)

    def __call__(
        self, q_positions: Int[Array, "#B T"], k_positions: Int[Array, "#B S"]
    ) -> Float32[Array, "#B N T S"]:
        """Compute the bias of each query and key; its memory is quadratic in their number.

        Parameters
        ----------
        q_positions, k_positions
            Positions of the queries and of the keys, [batch or 1, tokens].

        Returns
        -------
        float32 array [batch or 1, heads, queries, keys]
            The bias, for `tjx_kernels.flash_attention`.
        """
        distance_BTS = q_positions[:, :, None] - k_positions[:, None]
        past_BTS = jnp.maximum(distance_BTS, 0) if self.causal else jnp.abs(distance_BTS)
        farthest = len(self.bucket_of_distance) - 1
        buckets_BTS = jnp.asarray(self.bucket_of_distance)[jnp.minimum(past_BTS, farthest)]
        if not self.causal:
            buckets_BTS = jnp.where(distance_BTS < 0, self.count // 2, 0) + buckets_BTS
        # A sum over all buckets in place of a lookup: its gradient is a sum too, no scatter.
        number_1111R = jnp.arange(self.count).reshape(1, 1, 1, 1, -1)
        is_bucket = buckets_BTS[:, None, :, :, None] == number_1111R
        table_RN = self.gather(self.embedding, self.axes)
        bias = jnp.where(is_bucket, table_RN.T[None, :, None, None], 0).sum(-1)
        axes = (None if bias.shape[0] == 1 else "batch", "heads", None, None)
        return self.layout.place(bias, axes)


def distance_buckets(count: int, max_distance: int) -> list[int]:
    """Return the bucket of each distance from 0 to `max_distance`, in float32 as transformers.

    Half of the buckets are for one distance each; the others grow by a constant factor.

    Parameters
    ----------
    count
        Number of buckets.
    max_distance
        Distance from which on all have the last bucket, in tokens.

    Examples
    --------
    >>> distance_buckets(8, 16)
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = count // 2
    far = np.arange(exact, max_distance + 1, dtype=np.float32)
    steps = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    buckets = exact + (steps * np.float32(count - exact)).astype(np.int64)
    return [*range(exact), *np.minimum(buckets, count - 1).tolist()]
