"""Configuration and presets of the encoder-decoder; needs only the standard library."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tjx_nn.config import Activation, NormPosition, Positions, TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.problems import Problem
from tjx_nn.sub_configs import LatentConfig, SparseConfig, check_sizes


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig, Presets):
    """Configuration of an encoder-decoder; the defaults are the base Transformer.

    `n_layer` is the depth of the decoder, and `max_seq_len` the limit of source and target each.
    Attention fields apply to cross attention too, except positions, relative_buckets, window,
    latent and sparse.

    Attributes
    ----------
    family
        Name of the model family.
    vocab_size
        Number of target token ids.
    source_vocab_size
        Number of source token ids, for a separate embedding table; None shares vocabulary and table
        with the target.
    n_encoder_layer
        Number of encoder blocks.
    scale_embeddings
        Whether to multiply token embeddings by sqrt(d_model).
    embedding_norm
        Whether to normalize embeddings before the first block (BART).
    tied_head
        Whether the output head shares the target token embeddings.
    logit_bias
        Whether the head has a bias.
    logit_scale
        Factor of the logits, before their bias: 1 / sqrt(d_model) in T5 with a tied head.
    relative_buckets
        Number of buckets of relative positions in self-attention, even; each head adds a learned
        bias to the scores of a bucket, the same in all blocks (T5). None has no such bias.
    relative_max_distance
        Distance in tokens from which on all positions share the last bucket; up to it the buckets
        grow logarithmically.
    pad_id
        Padding token, for tokenizers; the model uses only masks.
    start_id
        First token of a target.
    stop_id
        Last token of a target.

    Raises
    ------
    ValueError
        With a line for each invalid field.

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
    logit_scale: float = 1.0
    relative_buckets: int | None = None
    relative_max_distance: int = 128
    pad_id: int = 0
    start_id: int = 1
    stop_id: int = 2

    def validate(self) -> list[Problem]:
        """Return the errors of this configuration."""
        problems = check_sizes(self, "vocab_size", "source_vocab_size", "n_encoder_layer")
        special = ("pad_id", "start_id", "stop_id")
        problems += check_sizes(self, *special, at_least=0)
        if not problems:
            problems += [
                Problem(
                    name,
                    f"got {value}; expected 0 to {self.vocab_size - 1}, as vocab_size is "
                    f"{self.vocab_size}",
                    ("vocab_size",),
                )
                for name in special
                if (value := getattr(self, name)) >= self.vocab_size
            ]
            if self.experts.count and self.experts.first_layer >= self.n_encoder_layer:
                problems.append(
                    Problem(
                        "experts.first_layer",
                        f"got {self.experts.first_layer} with n_encoder_layer "
                        f"{self.n_encoder_layer}; expected at most {self.n_encoder_layer - 1}",
                        ("n_encoder_layer",),
                    )
                )
            if self.experts.count and self.n_encoder_layer % self.experts.every:
                problems.append(
                    Problem(
                        "experts.every",
                        f"got {self.experts.every} with n_encoder_layer "
                        f"{self.n_encoder_layer}; expected a divisor of it",
                        ("n_encoder_layer",),
                    )
                )
        if self.parallel_block:
            problems.append(
                Problem(
                    "parallel_block",
                    "got True; expected False, as decoder blocks have cross attention "
                    "between attention and MLP; omit it",
                )
            )
        if self.norm_position not in ("pre", "post"):
            problems.append(
                Problem(
                    "norm_position",
                    f"got {self.norm_position!r}; expected 'pre' or 'post', as cross "
                    "attention has one norm",
                )
            )
        if not self.logit_scale > 0:
            problems.append(
                Problem("logit_scale", f"got {self.logit_scale!r}; expected a positive number")
            )
        return [*problems, *self._bad_buckets(), *super().validate()]

    def _bad_buckets(self) -> list[Problem]:
        problems = check_sizes(self, "relative_buckets", "relative_max_distance")
        if problems or self.relative_buckets is None:
            return problems
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            problems.append(
                Problem(
                    "relative_buckets",
                    f"got {self.relative_buckets}; expected an even number of at least 4, or None",
                )
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            problems.append(
                Problem(
                    "relative_max_distance",
                    f"got {self.relative_max_distance} with relative_buckets "
                    f"{self.relative_buckets}; expected more than half of the buckets, as each of "
                    "these is for one distance; increase it",
                    ("relative_buckets",),
                )
            )
        if self.latent.kv_dim is not None or self.sparse.top_k is not None:
            problems.append(
                Problem(
                    "relative_buckets",
                    f"got {self.relative_buckets}; expected None with latent.kv_dim "
                    "and with sparse.top_k, whose attention has no bias of scores; omit it",
                    ("latent.kv_dim", "sparse.top_k"),
                )
            )
        return problems

    @property
    def source_vocab(self) -> int:
        """Number of token ids of the source, `source_vocab_size` resolved."""
        return self.vocab_size if self.source_vocab_size is None else self.source_vocab_size

    @property
    def has_logit_bias(self) -> bool:
        """Whether the head has a bias: `logit_bias`, as in the configuration of BERT."""
        return self.logit_bias

    @property
    def encoder(self) -> "EncoderDecoderConfig":
        """Configuration of the encoder: the same with `n_encoder_layer` blocks."""
        return dataclasses.replace(self, n_layer=self.n_encoder_layer)

    @property
    def cross(self) -> "EncoderDecoderConfig":
        """Configuration of cross attention: multi-head attention without positions."""
        return dataclasses.replace(
            self, positions="none", nope_every=None, relative_buckets=None, latent=LatentConfig(),
            sparse=SparseConfig(),
        )  # fmt: skip


# Vaswani et al. 2017, "Attention Is All You Need", table 3; seq2seq_toy is a small model for
# byte strings: 256 bytes after three special tokens.
EncoderDecoderConfig.PRESETS = {
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
