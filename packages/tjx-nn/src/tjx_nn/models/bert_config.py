"""Configuration and presets of BERT; importing it needs only the standard library."""

from dataclasses import dataclass
from typing import Any, Literal

from tjx_nn.config import Activation, NormPosition, TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.problems import Problem
from tjx_nn.sub_configs import RopeConfig, check_sizes, check_tokenizer_size


@dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig, Presets):
    """Configuration of a bidirectional encoder; the defaults are BERT base.

    Attributes
    ----------
    family
        Name of the model family.
    vocab_size
        Number of token ids.
    tokenizer_size
        Number of ids of the tokenizer, the mask token included. Ids from here to vocab_size have
        probability 0 in loss and logits. None is vocab_size.
    n_token_types
        Number of token types (sentence A and B); 0 has no table.
    pad_id
        Padding token, for tokenizers; the model uses only `mask`.
    n_classes
        Number of classes of `classify`; None has no classification head.
    logit_bias
        Whether the masked-language-model head has a bias; None is bias.

    Raises
    ------
    ValueError
        With a line for each invalid field.

    Examples
    --------
    >>> BertConfig.preset("bert_base", n_classes=2).head_dim
    64
    """

    family: Literal["bert"] = "bert"
    vocab_size: int = 30522
    tokenizer_size: int | None = None
    max_seq_len: int = 512
    n_token_types: int = 2
    pad_id: int = 0
    n_classes: int | None = None
    logit_bias: bool | None = None
    norm_position: NormPosition = "post"
    norm_eps: float = 1e-12
    activation: Activation = "gelu_erf"

    def validate(self) -> list[Problem]:
        """Return the errors of this configuration."""
        problems = check_sizes(self, "vocab_size", "n_classes")
        problems += check_tokenizer_size(self.tokenizer_size, self.vocab_size)
        problems += check_sizes(self, "n_token_types", "pad_id", at_least=0)
        if not problems and self.pad_id >= self.vocab_size:
            problems.append(
                Problem(
                    "pad_id",
                    f"got {self.pad_id}; expected 0 to {self.vocab_size - 1}, as vocab_size is "
                    f"{self.vocab_size}",
                    ("vocab_size",),
                )
            )
        return [*problems, *super().validate()]

    @property
    def has_logit_bias(self) -> bool:
        """Whether the head has a bias, `logit_bias` resolved."""
        return self.bias if self.logit_bias is None else self.logit_bias


_MODERN: dict[str, Any] = {
    "vocab_size": 50368,
    "max_seq_len": 8192,
    "n_token_types": 0,
    "pad_id": 50283,
    "positions": "rope",
    "rope": RopeConfig(base=160000.0, local_base=10000.0),
    "norm_position": "pre",
    "norm_eps": 1e-5,
    "first_norm": False,
    "activation": "geglu_erf",
    "bias": False,
    "logit_bias": True,
    "window": 65,
    "symmetric_window": True,
    "global_every": 3,
    "global_first": True,
}
# Devlin et al. 2018, "BERT", section 3; Warner et al. 2024, "Smarter, Better, Faster, Longer: A
# Modern Bidirectional Encoder", table 4.
BertConfig.PRESETS = {
    "bert_base": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "bert_large": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "modernbert_base": {**_MODERN, "n_layer": 22, "n_head": 12, "d_model": 768, "d_ff": 1152},
    "modernbert_large": {**_MODERN, "n_layer": 28, "n_head": 16, "d_model": 1024, "d_ff": 2624},
}
