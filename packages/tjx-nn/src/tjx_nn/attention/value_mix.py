"""Mix of a layer's values with values that all blocks share.

Axes in names: B batch, T time, K key heads, H head_dim.
"""

from typing import NamedTuple

from jaxtyping import Array, Float


class ValueMix(NamedTuple):
    """Weighted sum ``scales[0] * v + scales[1] * shared`` of the values v of a layer.

    Zhou et al. 2024, "Value Residual Learning", whose shared values are those of the first block;
    speed runs of GPT-2 (2024) take them from a table of token embeddings.

    Attributes
    ----------
    scales
        The two factors, float32 [2].
    shared
        Values that all blocks share, [batch, tokens, kv_heads, head_dim].
    """

    scales: Float[Array, "2"]
    shared: Float[Array, "B T K H"]

    def __call__(self, values: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        """Return the mixed values, in the dtype of `values`."""
        scales = self.scales.astype(values.dtype)
        return scales[0] * values + scales[1] * self.shared
