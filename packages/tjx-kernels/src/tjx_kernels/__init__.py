"""Attention and fused cross-entropy kernels for JAX.

- `flash_attention`: exact attention with memory linear in the sequence length;
  `register_backend` adds an implementation.
- `sharded_flash_attention`: the same with batch, heads and tokens sharded over a mesh;
  `ring_attention` for one sequence sharded over devices, inside `jax.shard_map`.
- `decode_attention`: attention of new queries to a KV cache.
- `linear_cross_entropy`: output projection and cross-entropy without the logits of all tokens.
- `linear_kl_divergence`: the divergence of two models' next tokens in the same way.
- `embedding_lookup`: table lookup with a deterministic gradient.
"""

from tjx_kernels.attention.api import flash_attention as flash_attention
from tjx_kernels.attention.backend import AttentionBackend as AttentionBackend
from tjx_kernels.attention.backends.reference import attention_reference as attention_reference
from tjx_kernels.attention.call import AttentionCall as AttentionCall
from tjx_kernels.attention.call import Operands as Operands
from tjx_kernels.attention.diagnosis import chosen_implementation as chosen_implementation
from tjx_kernels.attention.registry import backends as backends
from tjx_kernels.attention.registry import implementations_for as implementations_for
from tjx_kernels.attention.registry import register_backend as register_backend
from tjx_kernels.attention.registry import unregister_backend as unregister_backend
from tjx_kernels.attention.support_table import support_table as support_table
from tjx_kernels.cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from tjx_kernels.cross_entropy.divergence import linear_kl_divergence as linear_kl_divergence
from tjx_kernels.decode import decode_attention as decode_attention
from tjx_kernels.embedding import embedding_lookup as embedding_lookup
from tjx_kernels.sharded.api import sharded_flash_attention as sharded_flash_attention
from tjx_kernels.sharded.ring import ring_attention as ring_attention
from tjx_kernels.sharded.ring_schedule import unzigzag as unzigzag
from tjx_kernels.sharded.ring_schedule import zigzag as zigzag
from tjx_kernels.sharded.ring_schedule import zigzag_positions as zigzag_positions

__version__ = "0.2.0"

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "Operands",
    "attention_reference",
    "backends",
    "chosen_implementation",
    "decode_attention",
    "embedding_lookup",
    "flash_attention",
    "implementations_for",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "register_backend",
    "ring_attention",
    "sharded_flash_attention",
    "support_table",
    "unregister_backend",
    "unzigzag",
    "zigzag",
    "zigzag_positions",
]
