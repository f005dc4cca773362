"""ViT: vision transformer that classifies images from a sequence of patches.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words".

Axes in names: B batch, H height, W width (both in pixels), C channels, T tokens, D d_model.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.make_layers import linear
from tjx_nn.layers.scan_layers import AuxLosses, LayerRange, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence, make_param
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.vit_config import ViTConfig

Images = Float[Array | np.ndarray, "B H W C"]


class ViT(ShardedModule):
    """Vision transformer for image classification.

    Parameters
    ----------
    config
        Configuration of the model.
    rngs
        Source of random initial values, with the distributions of `GPT`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, pixels = config.d_model, config.patch_size**2 * config.channels
        # Input features of the kernel: (row in the patch, column in the patch, channel).
        self.patch = linear(config, (None, "embed"), (pixels, d), float8=False, rngs=rngs)
        vector = normal(config.init_std)(rngs.params(), (d,), jnp.float32)
        self.cls = make_param(vector, ("embed",)) if config.pool == "class" else None
        self.wpe = position_table(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.head = linear(config, ("embed", None), (d, config.n_classes), float8=False, rngs=rngs)

    def __call__(
        self, images: Images, *, dropout_key: Array | None = None
    ) -> Float32[Array, "B classes"]:
        """Compute the class logits of images.

        Parameters
        ----------
        images
            Images of the configured size, [batch, height, width, channels].
        dropout_key
            PRNG key of this step's dropout; None disables dropout (evaluation).

        Returns
        -------
        Array
            Logits, float32 [batch, n_classes].

        Raises
        ------
        ValueError
            If the images have another size.
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
        """Compute the classification losses.

        Parameters
        ----------
        images, dropout_key
            As for calling the model.
        labels
            Class of each image; the loss of -100 is 0.

        Returns
        -------
        Losses
            Loss of each image in nats, float32 [batch], and auxiliary losses.
        """
        x = self.embed_tokens(images, dropout_key=dropout_key)
        x, stack_losses = self.run_blocks(x, images, dropout_key=dropout_key)
        return combine_losses(self.config, self.token_losses(x, labels), stack_losses)

    def embed_tokens(
        self, images: Images, *, dropout_key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Compute the residual stream of patches and class token before the first block.

        Parameters
        ----------
        images, dropout_key
            As for calling the model.

        Returns
        -------
        array [batch, tokens, d_model]
            The residual stream.

        Raises
        ------
        ValueError
            If the images do not have the size and channels of the model.
        """
        config = self.config
        expected = (*config.height_width, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images: got (height, width, channels) {images.shape[1:]}; expected {expected}; "
                "resize the images or set config.image_size"
            )
        _, key = split_layer_keys(config, dropout_key)
        x = self.patch(patches(jnp.asarray(images), config.patch_size)).astype(jnp.float32)
        if self.cls is not None:
            cls_D = self.gather(self.cls, ("embed",))
            x = jnp.concatenate([jnp.broadcast_to(cls_D, (x.shape[0], 1, config.d_model)), x], 1)
        return embed(config, x, None, self.wpe, dropout_key=key, layout=self.layout)

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        images: Images,  # noqa: ARG002  other models take their tokens here
        *,
        layers: LayerRange | None = None,
        drop_tokens: bool = True,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], list[AuxLosses]]:
        """Apply the blocks to the residual stream, as `GPT.run_blocks`.

        Parameters
        ----------
        x, layers, drop_tokens
            As for `GPT.run_blocks`.
        images, dropout_key
            As for calling the model.

        Returns
        -------
        x : array [batch, tokens, d_model]
            The residual stream after the blocks.
        aux_losses : list of AuxLosses
            Auxiliary losses of each block.
        """
        keys, _ = split_layer_keys(self.config, dropout_key)
        metadata = TokenMetadata(jnp.arange(x.shape[1])[None])
        return self.encoder(x, metadata, dropout_keys=keys, drop_tokens=drop_tokens, layers=layers)

    def token_losses(
        self, x: Float[Array, "B T D"], labels: Int[Array | np.ndarray, " B"]
    ) -> Float32[Array, " B"]:
        """Compute the cross-entropy of each label from the output of the last block.

        Parameters
        ----------
        x
            Output of the last block, [batch, tokens, d_model].
        labels
            Class of each image, [batch]; the loss of -100 is 0.

        Returns
        -------
        float32 array [batch]
            Losses in nats.
        """
        bias = self.head.bias
        return head_losses(
            self._pool(x) / self.config.width_multiplier,
            self.head.gather(self.head.kernel, self.head.axes).T,
            labels,
            bias=None if bias is None else bias[...],
        )

    def pooled(self, images: Images, *, dropout_key: Array | None = None) -> Float[Array, "B D"]:
        """Compute the pooled features of images; parameters as for calling the model.

        Parameters
        ----------
        images, dropout_key
            As for calling the model.

        Returns
        -------
        array [batch, d_model]
            Features.
        """
        x = self.embed_tokens(images, dropout_key=dropout_key)
        x, _ = self.run_blocks(x, images, dropout_key=dropout_key, drop_tokens=False)
        return self._pool(x)

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        x = gather_sequence(self.layout, self.encoder.final_norm(x))
        return x[:, 0] if self.cls is not None else x.mean(1)


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T pixels"]:
    """Split images into flattened square patches, row by row; features are (row, column, channel).

    Examples
    --------
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> print(patches(image, 2)[0, 1])  # the upper right patch
    [2. 3. 6. 7.]
    """
    return rearrange(images, "b (r p) (c q) ch -> b (r c) (p q ch)", p=size, q=size)
