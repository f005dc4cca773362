"""The configuration of BERT; only the standard library is needed to read it."""

from dataclasses import dataclass
from typing import Any, Literal

from tjx_nn.config import Activation, NormPosition, TransformerConfig
from tjx_nn.sub_configs import check_sizes, check_tokenizer_size, preset_fields


@dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """Sizes and choices of an encoder; the defaults are BERT base.

    Attributes
    ----------
    family
        What kind of model this is.
    vocab_size
        Number of token ids.
    tokenizer_size
        Number of ids that the tokenizer has, the mask's among them; the others, up to vocab_size,
        have no probability: loss and logits leave them out. None is vocab_size.
    n_token_types
        Kinds of segments that a token may belong to (BERT's sentence A and B); 0 has no table.
    pad_id
        Token that fills rows up. The model does not look for it: `mask` says where padding is.
    n_classes
        Classes that `classify` tells apart; None is a model without a classification head.

    Raises
    ------
    ValueError
        Naming every field that is wrong, one a line.

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
    norm_position: NormPosition = "post"
    norm_eps: float = 1e-12
    activation: Activation = "gelu_erf"

    def validate(self) -> list[str]:
        """List the errors in the fields of this configuration."""
        problems = check_sizes(self, "vocab_size", "n_classes")
        problems += check_tokenizer_size(self.tokenizer_size, self.vocab_size)
        problems += check_sizes(self, "n_token_types", "pad_id", at_least=0)
        if not problems and self.pad_id >= self.vocab_size:
            problems.append(
                f"pad_id is {self.pad_id} and vocab_size is {self.vocab_size}: "
                f"give 0 to {self.vocab_size - 1}"
            )
        return [*problems, *super().validate()]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BertConfig":
        """Return a published model's configuration, with fields replaced by `overrides`.

        Parameters
        ----------
        name
            One of bert_base, bert_large.
        **overrides
            Fields of `BertConfig`.

        Raises
        ------
        ValueError
            If there is no preset of this name; the message names the nearest.
        """
        return cls(**{**preset_fields(name, _PRESETS), **overrides})


# Devlin et al. 2018, "BERT", section 3.
_PRESETS: dict[str, dict[str, Any]] = {
    "bert_base": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "bert_large": {"n_layer": 24, "n_head": 16, "d_model": 1024},
}
