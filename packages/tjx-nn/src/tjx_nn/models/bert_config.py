"""Configuration and presets of BERT; importing it needs only the standard library."""

from dataclasses import dataclass
from typing import Literal

from tjx_nn.config import Activation, NormPosition, TransformerConfig
from tjx_nn.models.presets import Presets
from tjx_nn.sub_configs import check_sizes, check_tokenizer_size


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

    def validate(self) -> list[str]:
        """Return the errors of this configuration, a line each."""
        problems = check_sizes(self, "vocab_size", "n_classes")
        problems += check_tokenizer_size(self.tokenizer_size, self.vocab_size)
        problems += check_sizes(self, "n_token_types", "pad_id", at_least=0)
        if not problems and self.pad_id >= self.vocab_size:
            problems.append(
                f"pad_id: got {self.pad_id}; expected 0 to {self.vocab_size - 1}, as vocab_size is "
                f"{self.vocab_size}"
            )
        return [*problems, *super().validate()]

    @property
    def has_logit_bias(self) -> bool:
        """Whether the head has a bias, `logit_bias` resolved."""
        return self.bias if self.logit_bias is None else self.logit_bias


# Devlin et al. 2018, "BERT", section 3.
BertConfig.PRESETS = {
    "bert_base": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "bert_large": {"n_layer": 24, "n_head": 16, "d_model": 1024},
}
