"""Attention and fused loss kernels for JAX.

`flash_attention` is exact attention whose memory grows linearly with the sequence length;
`linear_cross_entropy` is the loss of a language model's head without the logits of all tokens in
memory.
"""

from tjx_kernels.attention import chosen_implementation as chosen_implementation
from tjx_kernels.attention import flash_attention as flash_attention
from tjx_kernels.attention import implementations_for as implementations_for
from tjx_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from tjx_kernels.reference import attention_reference as attention_reference
from tjx_kernels.support_table import support_table as support_table

__all__ = [
    "attention_reference",
    "chosen_implementation",
    "flash_attention",
    "implementations_for",
    "linear_cross_entropy",
    "support_table",
]
