"""Attention and fused loss kernels for JAX.

`flash_attention` is exact attention whose memory grows linearly with the sequence length;
`sharded_flash_attention` the same over batch, heads and tokens spread over a mesh, `ring_attention`
over a sequence spread over devices, `decode_attention` for new queries against a KV cache.
`embedding_lookup` is a table lookup with a deterministic gradient.
`linear_cross_entropy` is the loss of a language model's head without the logits of all tokens in
memory.
"""

from tjx_kernels.attention.api import chosen_implementation as chosen_implementation
from tjx_kernels.attention.api import flash_attention as flash_attention
from tjx_kernels.attention.api import implementations_for as implementations_for
from tjx_kernels.attention.backends.reference import attention_reference as attention_reference
from tjx_kernels.attention.support_table import support_table as support_table
from tjx_kernels.cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from tjx_kernels.decode import decode_attention as decode_attention
from tjx_kernels.embedding import embedding_lookup as embedding_lookup
from tjx_kernels.sharded.api import sharded_flash_attention as sharded_flash_attention
from tjx_kernels.sharded.ring import ring_attention as ring_attention
from tjx_kernels.sharded.ring_schedule import unzigzag as unzigzag
from tjx_kernels.sharded.ring_schedule import zigzag as zigzag
from tjx_kernels.sharded.ring_schedule import zigzag_positions as zigzag_positions

__version__ = "0.2.0"

__all__ = [
    "attention_reference",
    "chosen_implementation",
    "decode_attention",
    "embedding_lookup",
    "flash_attention",
    "implementations_for",
    "linear_cross_entropy",
    "ring_attention",
    "sharded_flash_attention",
    "support_table",
    "unzigzag",
    "zigzag",
    "zigzag_positions",
]
