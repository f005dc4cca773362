"""ViT: images cut into patches, which are the tokens of a transformer.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words".

Axes in names: B batch, H height, W width (both in pixels), C channels, T tokens, D d_model.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.mha import AuxLosses, TokenMetadata
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.linear import linear
from tjx_nn.layers.scan_layers import LayerRange, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence
from tjx_nn.losses import Losses, head_losses, losses
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.vit_config import ViTConfig

Images = Float[Array | np.ndarray, "B H W C"]


class ViT(ShardedModule):
    """A bidirectional transformer on patches.

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values, which are those of `GPT`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, pixels = config.d_model, config.patch_size**2 * config.channels
        # Rows of the kernel go by (row in the patch, column in the patch, channel).
        self.patch = linear(config, (None, "embed"), (pixels, d), float8=False, rngs=rngs)
        vector = normal(config.init_std)(rngs.params(), (d,), jnp.float32)
        self.cls = nnx.Param(vector, logical_axes=("embed",)) if config.pool == "class" else None
        self.wpe = position_table(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.head = linear(config, ("embed", None), (d, config.n_classes), float8=False, rngs=rngs)

    def __call__(
        self, images: Images, *, dropout_key: Array | None = None
    ) -> Float32[Array, "B classes"]:
        """Return the logits of each image's class.

        Parameters
        ----------
        images
            Of the configuration's height, width and channels.
        dropout_key
            Key of this step's dropout. None means no dropout: give a key exactly when training.

        Raises
        ------
        ValueError
            If the images are of another size.
        """
        x = self.pooled(images, dropout_key=dropout_key)
        y: Array = self.head(x / self.config.width_multiplier).astype(jnp.float32)
        return y

    def losses(
        self,
        images: Images,
        labels: Int[Array | np.ndarray, " B"],
        *,
        dropout_key: Array | None = None,
    ) -> Losses:
        """Return the cross-entropy of each image's label and the model's other losses.

        Parameters
        ----------
        images, dropout_key
            As for calling the model.
        labels
            The class of each image; where it is -100 the loss is 0.
        """
        x = self.begin(images, dropout_key=dropout_key)
        x, reported = self.run_blocks(x, images, dropout_key=dropout_key)
        return losses(self.config, self.finish(x, labels), reported)

    def begin(self, images: Images, *, dropout_key: Array | None = None) -> Float[Array, "B T D"]:
        """Return the residual stream before the first block; the parts are as those of `GPT`."""
        config = self.config
        expected = (*config.height_width, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.shape[1:]} and the model is for (height, width, channels) "
                f"{expected}: resize the images, or give the configuration their size"
            )
        _, last = split_layer_keys(config, dropout_key)
        x = self.patch(patches(jnp.asarray(images), config.patch_size)).astype(jnp.float32)
        if self.cls is not None:
            first = jnp.broadcast_to(
                self.table(self.cls, ("embed",)), (x.shape[0], 1, config.d_model)
            )
            x = jnp.concatenate([first, x], 1)
        return embed(config, x, None, self.wpe, dropout_key=last, layout=self.layout)

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        images: Images,  # noqa: ARG002  other models read their tokens again
        *,
        part: LayerRange | None = None,
        drop: bool = True,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Return the residual stream after the last block, and what the stacks report."""
        keys, _ = split_layer_keys(self.config, dropout_key)
        where = TokenMetadata(jnp.arange(x.shape[1])[None])
        return self.encoder(x, where, dropout_keys=keys, drop=drop, part=part)

    def finish(
        self, x: Float[Array, "B T D"], labels: Int[Array | np.ndarray, " B"]
    ) -> Float32[Array, " B"]:
        """Return the cross-entropy of each label, for what the last block returns."""
        bias = self.head.bias
        return head_losses(
            self._pool(x) / self.config.width_multiplier,
            self.head.table(self.head.kernel, self.head.axes).T,
            labels,
            bias=None if bias is None else bias[...],
        )

    def pooled(self, images: Images, *, dropout_key: Array | None = None) -> Float[Array, "B D"]:
        """Return the vector of each image that the head reads; parameters as for calling."""
        x = self.begin(images, dropout_key=dropout_key)
        return self._pool(self.run_blocks(x, images, dropout_key=dropout_key, drop=False)[0])

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        x = gather_sequence(self.layout, self.encoder.normalised(x))
        return x[:, 0] if self.cls is not None else x.mean(1)


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T pixels"]:
    """Cut images into squares, row by row; each is flattened as (row, column, channel).

    Examples
    --------
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> print(patches(image, 2)[0, 1])  # the upper right one
    [2. 3. 6. 7.]
    """
    b, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(b, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * columns, size * size * channels)
