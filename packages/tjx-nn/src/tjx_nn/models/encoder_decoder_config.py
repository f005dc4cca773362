"""The configuration of the encoder-decoder; only the standard library is needed to read it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tjx_nn.config import Activation, NormPosition, Positions, TransformerConfig
from tjx_nn.sub_configs import LatentConfig, SparseConfig, check_sizes, preset_fields


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """Sizes and choices of an encoder and a decoder; the defaults are the base Transformer.

    `n_layer` is the decoder's depth, and `max_seq_len` holds for source and target each. Fields of
    attention hold for cross attention too, but for positions, window, latent and sparse.

    Attributes
    ----------
    family
        What kind of model this is.
    vocab_size
        Number of token ids of the target.
    source_vocab_size
        Number of token ids of the source, which then has a table of its own; None: source and
        target share vocabulary and table.
    n_encoder_layer
        Number of the encoder's blocks.
    scale_embeddings
        Whether embeddings of tokens are multiplied by sqrt(d_model).
    embedding_norm
        Whether embeddings are normalised before the first block (BART).
    tied_head
        Whether the output head is the target's table of token embeddings.
    logit_bias
        Whether the head has a bias.
    pad_id
        Token that fills rows up. The model does not look for it: masks say where padding is.
    start_id
        Token that a target begins with.
    stop_id
        Token that a target ends with.

    Raises
    ------
    ValueError
        Naming every field that is wrong, one a line.

    Examples
    --------
    >>> EncoderDecoderConfig.preset("transformer_big").head_dim
    64
    """

    family: Literal["encoder_decoder"] = "encoder_decoder"
    vocab_size: int = 37000
    source_vocab_size: int | None = None
    n_layer: int = 6
    n_encoder_layer: int = 6
    n_head: int = 8
    d_model: int = 512
    positions: Positions = "sinusoidal"
    norm_position: NormPosition = "post"
    activation: Activation = "relu"
    scale_embeddings: bool = True
    embedding_norm: bool = False
    tied_head: bool = True
    logit_bias: bool = False
    pad_id: int = 0
    start_id: int = 1
    stop_id: int = 2

    def validate(self) -> list[str]:
        """List the errors in the fields of this configuration."""
        problems = check_sizes(self, "vocab_size", "source_vocab_size", "n_encoder_layer")
        special = ("pad_id", "start_id", "stop_id")
        problems += check_sizes(self, *special, at_least=0)
        if not problems:
            problems += [
                f"{name} is {value} and vocab_size is {self.vocab_size}: "
                f"give 0 to {self.vocab_size - 1}"
                for name in special
                if (value := getattr(self, name)) >= self.vocab_size
            ]
            if self.experts.count and self.experts.first_layer >= self.n_encoder_layer:
                problems.append(
                    f"experts.first_layer is {self.experts.first_layer} and n_encoder_layer is "
                    f"{self.n_encoder_layer}: give at most {self.n_encoder_layer - 1}"
                )
        if self.parallel_block:
            problems.append(
                "parallel_block is True: a decoder's block has a cross attention between attention "
                "and MLP; leave it out"
            )
        return [*problems, *super().validate()]

    @property
    def source_vocab(self) -> int:
        """Number of token ids of the source, `source_vocab_size` resolved."""
        return self.vocab_size if self.source_vocab_size is None else self.source_vocab_size

    @property
    def encoder(self) -> "EncoderDecoderConfig":
        """The configuration with the encoder's depth."""
        return dataclasses.replace(self, n_layer=self.n_encoder_layer)

    @property
    def cross(self) -> "EncoderDecoderConfig":
        """The configuration of cross attention, which is ordinary and knows no positions."""
        return dataclasses.replace(
            self, positions="none", latent=LatentConfig(), sparse=SparseConfig()
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "EncoderDecoderConfig":
        """Return a known model's configuration, with fields replaced by `overrides`.

        Parameters
        ----------
        name
            One of transformer_base, transformer_big, seq2seq_toy.
        **overrides
            Fields of `EncoderDecoderConfig`.

        Raises
        ------
        ValueError
            If there is no preset of this name; the message names the nearest.
        """
        return cls(**{**preset_fields(name, _PRESETS), **overrides})


# Vaswani et al. 2017, "Attention Is All You Need", table 3; seq2seq_toy is one of our own for byte
# strings: 256 bytes after the three special tokens.
_PRESETS: dict[str, dict[str, Any]] = {
    "transformer_base": {},
    "transformer_big": {"n_head": 16, "d_model": 1024},
    "seq2seq_toy": {
        "vocab_size": 259,
        "max_seq_len": 64,
        "n_layer": 2,
        "n_encoder_layer": 2,
        "n_head": 4,
        "d_model": 128,
        "norm_position": "pre",
    },
}
