"""Configuration and presets of GPT; importing it needs only the standard library."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tjx_nn.config import TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.problems import Problem
from tjx_nn.sub_configs import (
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    check_choices,
    check_sizes,
    check_tokenizer_size,
)

ValueMixSource = Literal["none", "first_block", "embedding"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig(TransformerConfig, Presets):
    """Configuration of a decoder-only transformer; the defaults are GPT-2 small.

    Attributes
    ----------
    family
        Name of the model family.
    vocab_size
        Number of token ids of the embedding table and the head.
    tied_head
        Whether the output head shares the token embeddings.
    vocab_multiple
        Multiple that the rows of the token table are padded to, for sharding; padding rows are
        never used.
    scale_embeddings
        Whether to multiply token embeddings by sqrt(d_model) with "sinusoidal" positions (Vaswani
        et al. 2017, section 3.4).
    embedding_scale
        Factor of token embeddings, sqrt(d_model) in Gemma; None is 1.
    embedding_skip
        Whether the input of each block is a * x + b * e with the residual stream x, its value e
        before the first block, and trainable a and b, 1 and 0 at first (speed runs of GPT-2, 2024).
    value_mix
        Source u of the attention values a * v + b * u of each block, with trainable a and b, both
        0.5 at first: the values of the "first_block" (Zhou et al. 2024, "Value Residual Learning"),
        or "embedding", the token's row in a table that all blocks share (speed runs of GPT-2,
        2024); "none" keeps v.
    multi_token_loss
        Weight of the loss of the token after next in the training objective, such as 0.3,
        predicted by one more block from the output of the last block and the next token
        (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2); evaluations and generation omit it. 0 has no
        such block.
    tokenizer_size
        Number of ids of the tokenizer. Ids from here to vocab_size have probability 0 in loss,
        logits and samples. None is vocab_size.
    logit_scale
        Factor of the logits, before `logit_soft_cap` (Cohere, Granite).
    logit_soft_cap
        Bound of the logits, soft_cap * tanh(logit / soft_cap); None is unbounded.

    Raises
    ------
    ValueError
        With a line for each invalid field.

    Examples
    --------
    >>> GPTConfig(n_layer=2, d_model=64, n_head=4).head_dim
    16
    >>> GPTConfig.preset("gpt2_medium", max_seq_len=512).n_layer
    24
    """

    family: Literal["gpt"] = "gpt"
    vocab_size: int = 50257
    tied_head: bool = True
    vocab_multiple: int = 1
    scale_embeddings: bool = True
    embedding_scale: float | None = None
    embedding_skip: bool = False
    value_mix: ValueMixSource = "none"
    multi_token_loss: float = 0.0
    tokenizer_size: int | None = None
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    def validate(self) -> list[Problem]:
        """Return the errors of this configuration."""
        problems = [
            *check_sizes(self, "vocab_size", "vocab_multiple"),
            *check_tokenizer_size(self.tokenizer_size, self.vocab_size),
            *check_choices(self, value_mix=ValueMixSource),
            *super().validate(),
        ]
        problems += [
            Problem(name, f"got {value!r}; expected a positive number, or None")
            for name in ("logit_soft_cap", "embedding_scale")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if not 0 <= self.multi_token_loss < math.inf:
            problems.append(
                Problem(
                    "multi_token_loss",
                    f"got {self.multi_token_loss!r}; expected at least 0 and finite, such as 0.3",
                )
            )
        if self.value_mix != "none" and self.latent.kv_dim is not None:
            problems.append(
                Problem(
                    "value_mix",
                    f"got {self.value_mix!r}; expected 'none' with latent.kv_dim, as latent "
                    "attention caches no values; omit it",
                    ("latent.kv_dim",),
                )
            )
        if self.symmetric_window:
            problems.append(
                Problem(
                    "symmetric_window", "got True; expected False, as attention is causal; omit it"
                )
            )
        if not self.logit_scale > 0:
            problems.append(
                Problem("logit_scale", f"got {self.logit_scale!r}; expected a positive number")
            )
        return problems

    def pipeline_problems(self, stages: int) -> list[str]:
        """Return why the blocks cannot be split into equal pipeline stages, if they cannot.

        Parameters
        ----------
        stages
            Number of stages.

        Returns
        -------
        list of str
            A line for each reason; empty if the blocks can be split.
        """
        if self.embedding_skip:
            return [
                "embedding_skip: got True; expected False, as later pipeline stages do not receive "
                "the embeddings"
            ]
        if self.value_mix != "none":
            return [
                f"value_mix: got {self.value_mix!r}; expected 'none', as later pipeline stages do "
                "not receive the shared values"
            ]
        if self.multi_token_loss:
            return [
                f"multi_token_loss: got {self.multi_token_loss!r}; expected 0, as its block is in "
                "no pipeline stage"
            ]
        return super().pipeline_problems(stages)

    @property
    def vocab_rows(self) -> int:
        """Rows of the token table: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


_LLAMA: dict[str, Any] = {
    "positions": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tied_head": False,
}
# GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2. The
# others have the depth and width of GPT-2 small with the layers of Llama 3 and DeepSeek-V3.2.
GPTConfig.PRESETS = {
    "gpt2_small": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "gpt2_medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "gpt2_large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "gpt2_xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
    "llama_small": {**_LLAMA, "n_kv_head": 4, "rope": RopeConfig(base=500_000.0)},
    "deepseek_small": {
        **_LLAMA,
        "d_head": 64,
        "latent": LatentConfig(kv_dim=256, q_dim=384, rope_dim=32),
        "sparse": SparseConfig(top_k=256),
        "experts": ExpertsConfig(count=16, per_token=2, shared=1, d_ff=512, first_layer=1),
    },
}
