"""ViT: vision transformer that classifies images from a sequence of patches.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words". With the options of `ViTConfig` also the
vision encoders of DINOv2 (Oquab et al. 2023) and SigLIP (Zhai et al. 2023).

Axes in names: B batch, H height, W width (both in pixels), C channels, T tokens, P patches,
S tokens with registers, D d_model, F features of a pooled image.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Float32, Int

from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.embedding import embed, position_table
from tjx_nn.layers.linear import Linear
from tjx_nn.layers.make_layers import linear
from tjx_nn.layers.scan_layers import AuxLosses, LayerRange, split_layer_keys
from tjx_nn.layout import ShardedModule, gather_sequence, make_param
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.attention_pool import AttentionPool
from tjx_nn.models.encoder import Encoder
from tjx_nn.models.vit_config import ViTConfig

Images = Float[Array | np.ndarray, "B H W C"]
PatchMask = Bool[Array | np.ndarray, "B P"]


class ViT(ShardedModule):
    """Vision transformer for image classification, or without a head for features of images.

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
        self.cls = make_param(vector, ("embed",)) if config.has_class_token else None
        self.wpe = position_table(config, rows=config.max_seq_len - config.n_registers, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.head = _make_head(config, rngs) if config.n_classes is not None else None
        self.registers = _make_registers(config, rngs) if config.n_registers else None
        blank = jnp.zeros(d, jnp.float32)
        self.mask_token = make_param(blank, ("embed",)) if config.mask_token else None
        self.attention_pool = AttentionPool(config, rngs=rngs) if config.pool == "map" else None

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
            If the images have another size, or the model has no head.
        """
        head = self._head()
        x = self.pooled(images, dropout_key=dropout_key)
        y: Array = head(x / self.config.width_multiplier).astype(jnp.float32)
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

        Raises
        ------
        ValueError
            If the images have another size, or the model has no head.
        """
        x = self.embed_tokens(images, dropout_key=dropout_key)
        x, stack_losses = self.run_blocks(x, images, dropout_key=dropout_key)
        losses, z_loss = self.token_losses(x, labels)
        return combine_losses(self.config, losses, [*stack_losses, z_loss])

    def embed_tokens(
        self,
        images: Images,
        *,
        mask: PatchMask | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the residual stream of class token, registers and patches before the blocks.

        Parameters
        ----------
        images, dropout_key
            As for calling the model.
        mask
            Patches that the mask token replaces, [batch, patches], row by row; None is no patch.

        Returns
        -------
        array [batch, tokens, d_model]
            The residual stream.

        Raises
        ------
        ValueError
            If the images do not have the size and channels of the model, or there is a mask but no
            mask token.
        """
        config = self.config
        expected = (*config.height_width, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images: got (height, width, channels) {images.shape[1:]}; expected {expected}; "
                "resize the images or set config.image_size"
            )
        if mask is not None and self.mask_token is None:
            raise ValueError(
                "mask: got one for a model without a mask token; expected None; omit it, or set "
                "config.mask_token"
            )
        _, key = split_layer_keys(config, dropout_key)
        if config.crop:
            height, width = (count * config.patch_size for count in config.patches)
            images = images[:, :height, :width]
        x = self.patch(patches(jnp.asarray(images), config.patch_size)).astype(jnp.float32)
        if mask is not None and self.mask_token is not None:
            x = jnp.where(jnp.asarray(mask)[..., None], self.gather(self.mask_token, ("embed",)), x)
        if self.cls is not None:
            cls_D = self.gather(self.cls, ("embed",))
            x = jnp.concatenate([jnp.broadcast_to(cls_D, (x.shape[0], 1, config.d_model)), x], 1)
        table = self.wpe
        if self.registers is not None:
            x, table = self._insert_registers(self.registers, x), None
        return embed(config, x, None, table, dropout_key=key, layout=self.layout)

    def _insert_registers(
        self, registers: nnx.Param[Array], x: Float[Array, "B T D"]
    ) -> Float[Array, "B S D"]:
        """Add positions, then insert the registers, which have none, after the class token."""
        if self.wpe is not None:
            x = x + self.wpe.rows()[None]
        rows_RD = self.gather(registers, (None, "embed"))
        rows = jnp.broadcast_to(rows_RD, (x.shape[0], *rows_RD.shape))
        first = int(self.config.has_class_token)
        return jnp.concatenate([x[:, :first], rows, x[:, first:]], 1)

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
    ) -> tuple[Float32[Array, " B"], AuxLosses]:
        """Compute the cross-entropy of each label from the output of the last block.

        Parameters
        ----------
        x
            Output of the last block, [batch, tokens, d_model].
        labels
            Class of each image, [batch]; the loss of -100 is 0.

        Returns
        -------
        tokens : float32 array [batch]
            Losses in nats.
        aux_losses : AuxLosses
            "z_loss" with `config.z_loss`, float32 [1], else empty.

        Raises
        ------
        ValueError
            If the model has no head.
        """
        head = self._head()
        bias = head.bias
        return head_losses(
            self._pool(self._normalize(x)) / self.config.width_multiplier,
            head.gather(head.kernel, head.axes).T,
            labels,
            bias=None if bias is None else bias[...],
            z_loss=self.config.z_loss,
        )

    def features(
        self,
        images: Images,
        *,
        mask: PatchMask | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the features of every token: class token, registers, then patches row by row.

        Parameters
        ----------
        images, mask, dropout_key
            As for `embed_tokens`.

        Returns
        -------
        array [batch, tokens, d_model]
            Output of the last block, normalized; the first `config.n_prefix` tokens are no patches.

        Raises
        ------
        ValueError
            As `embed_tokens`.

        Examples
        --------
        >>> import jax
        >>> from tjx_nn import ViTConfig, bind, init
        >>> config = ViTConfig.preset("vit_mnist", n_classes=None, pool="map")
        >>> model = bind(config, init(config, jax.random.key(0)))
        >>> model.features(jnp.ones((1, 28, 28, 1))).shape
        (1, 16, 64)
        """
        x = self.embed_tokens(images, mask=mask, dropout_key=dropout_key)
        x, _ = self.run_blocks(x, images, dropout_key=dropout_key, drop_tokens=False)
        return self._normalize(x)

    def pooled(
        self,
        images: Images,
        *,
        mask: PatchMask | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B F"]:
        """Compute the pooled features of images, the input of the head.

        Parameters
        ----------
        images, mask, dropout_key
            As for `embed_tokens`.

        Returns
        -------
        array [batch, config.pooled_dim]
            Features.
        """
        return self._pool(self.features(images, mask=mask, dropout_key=dropout_key))

    def _normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return gather_sequence(self.layout, self.encoder.final_norm(x))

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B F"]:
        """Pool normalized features of tokens as `config.pool` says."""
        if self.config.pool == "class":
            return x[:, 0]
        patches_BPD = x[:, self.config.n_prefix :]
        if self.attention_pool is not None:
            return self.attention_pool(patches_BPD)
        mean_BD = patches_BPD.mean(1)
        return mean_BD if self.cls is None else jnp.concatenate([x[:, 0], mean_BD], -1)

    def _head(self) -> Linear:
        if self.head is None:
            raise ValueError(
                "config.n_classes: got None, a model without a head; expected the number of "
                "classes; set it, or call features or pooled"
            )
        return self.head


def _make_head(config: ViTConfig, rngs: nnx.Rngs) -> Linear:
    assert config.n_classes is not None
    shape = (config.pooled_dim, config.n_classes)
    return linear(config, ("embed", None), shape, float8=False, rngs=rngs)


def _make_registers(config: ViTConfig, rngs: nnx.Rngs) -> nnx.Param[Array]:
    shape = (config.n_registers, config.d_model)
    rows = normal(config.init_std)(rngs.params(), shape, jnp.float32)
    return make_param(rows, (None, "embed"))


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T pixels"]:
    """Split images into flattened square patches, row by row; features are (row, column, channel).

    Examples
    --------
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> print(patches(image, 2)[0, 1])  # the upper right patch
    [2. 3. 6. 7.]
    """
    return rearrange(images, "b (r p) (c q) ch -> b (r c) (p q ch)", p=size, q=size)
