"""Latent attention (MLA): keys and values of all heads are made of one narrow latent.

Only the latent is cached, and a key of a few rotary features that all heads share.

Axes in names: B batch, T time, S keys (of a cache: its slots), P keys that an indexer picks,
D d_model, N heads, H head_dim without the rotary part, R rotary part, V head_dim of values,
C latent, F features of all heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tjx_nn.attention.indexer import Indexer, select_cached_keys
from tjx_nn.attention.kv_cache import cached_attention
from tjx_nn.attention.mha import (
    AuxLosses,
    KVCache,
    TokenMetadata,
    attention_scale,
    merge_heads,
    slopes,
    write,
)
from tjx_nn.attention.sparse import attend_selected, sparse_attention
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import Linear, linear
from tjx_nn.layers.norms import make_norm
from tjx_nn.layers.position_encoding import apply_rope
from tjx_nn.layout import ShardedModule


class LatentAttention(ShardedModule):
    """Attention whose keys and values are linear in a shared latent.

    DeepSeek-AI 2024, "DeepSeek-V2", section 2.1. A query or key of a head is two parts side by
    side: one of the latent, without positions, and a rotary one of the residual stream. With
    `sparse.top_k` an indexer picks the keys, as in DeepSeek-V3.2.

    Parameters
    ----------
    config
        Sizes and choices.
    causal
        Whether tokens see only themselves and what comes before.
    rngs
        Source of the initial values.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs) -> None:
        latent = config.latent
        assert latent.kv_dim is not None
        self.config, self.causal, self.kv_dim = config, causal, latent.kv_dim
        d, n, c = config.d_model, config.n_head, latent.kv_dim
        q_dim = n * (config.head_dim + latent.rope_dim)
        if latent.q_dim is None:
            self.query = linear(config, ("embed", "heads"), (d, q_dim), rngs=rngs)
        else:
            self.query_down = linear(config, ("embed", "latent"), (d, latent.q_dim), rngs=rngs)
            self.query_norm = make_norm(config, latent.q_dim, axis="latent")
            self.query_up = linear(config, ("latent", "heads"), (latent.q_dim, q_dim), rngs=rngs)
        self.kv_down = linear(config, ("embed", "latent"), (d, c + latent.rope_dim), rngs=rngs)
        self.kv_norm = make_norm(config, c, axis="latent")
        self.key_up = linear(config, ("latent", "heads"), (c, n * config.head_dim), rngs=rngs)
        self.value_up = linear(config, ("latent", "heads"), (c, n * config.v_dim), rngs=rngs)
        out = (n * config.v_dim, d)
        self.out = linear(config, ("heads", "embed"), out, residual=True, rngs=rngs)
        self.indexer = None if config.sparse.top_k is None else Indexer(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: TokenMetadata,
        *,
        window: int | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Attend from each token to those that it may see; parameters as for `Attention`.

        Returns
        -------
        tuple
            The output, what a cache keeps ("latent", "rope_key", and with an indexer "index_key"),
            and measures: with an indexer those of `sparse_attention`.
        """
        config = self.config
        entries = self.keys_values(x, where)
        q_BTNF, (k_BSNF, v_BSNV) = self.queries(x, where), self._expanded(entries)
        if self.indexer is not None:
            index = self.indexer(x, where, entries["index_key"])
            out_BTNV, aux_losses = sparse_attention(
                config, q_BTNF, k_BSNF, v_BSNV, index, where,
                causal=self.causal, window=window, dropout_key=dropout_key,
            )  # fmt: skip
            return self.out(merge_heads(out_BTNV)), entries, aux_losses
        drops = config.attention_dropout if dropout_key is not None else 0.0
        with jax.named_scope("attention"):  # as profiles name it
            attended = self.layout.attend(
                q_BTNF,
                k_BSNF,
                v_BSNV,
                causal=self.causal,
                q_segment_ids=where.segment_ids,
                kv_segment_ids=where.segment_ids,
                window=window,
                soft_cap=config.attention_soft_cap,
                scale=attention_scale(config, q_BTNF.shape[3]),
                alibi_slopes=slopes(config),
                dropout_rate=drops,
                dropout_key=dropout_key if drops else None,
                implementation=config.attention_implementation,
            )
        return self.out(merge_heads(attended)), entries, {}

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        where: TokenMetadata,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend from new tokens to those of the cache, and to each other, as `Attention` does.

        Keys and values of heads are never made: q . (W c) is (W^T q) . c, and a sum of values the
        value of a sum of latents. The latent is the one key and value that all heads share.
        """
        config = self.config
        cache = write(cache, self.keys_values(x, where), where.positions)
        q_BTNF = self.queries(x, where)
        scale = attention_scale(config, q_BTNF.shape[3])
        q_BTNC = self._absorbed(q_BTNF)
        if self.indexer is None:
            k_BS1C = self._shared_key(cache["latent"], cache["rope_key"])
            summed = cached_attention(
                q_BTNC,
                k_BS1C,
                cache["latent"][:, :, None],
                where.positions,
                window=window,
                soft_cap=config.attention_soft_cap,
                scale=scale,
                alibi_slopes=slopes(config),
            )
        else:
            index = self.indexer(x, where, cache["index_key"])
            picked = select_cached_keys(config, index, where.positions, window)
            latent_BTPC = picked.of(cache["latent"])
            k_BTP1C = self._shared_key(latent_BTPC, picked.of(cache["rope_key"]))
            v_BTP1C = latent_BTPC[..., None, :]
            summed = attend_selected(config, q_BTNC, k_BTP1C, v_BTP1C, picked, scale=scale)
        w_CNV = self._up(self.value_up, config.v_dim)
        out_BTNV = jnp.einsum("btnc,cnv->btnv", summed, w_CNV)
        if self.value_up.bias is not None:  # weights of attention sum to 1
            bias_NV = self.value_up.bias[...].reshape(-1, config.v_dim)
            out_BTNV = out_BTNV + bias_NV.astype(out_BTNV.dtype)[None, None]
        return self.out(merge_heads(out_BTNV)), cache

    def queries(self, x: Float[Array, "B T D"], where: TokenMetadata) -> Float[Array, "B T N F"]:
        """Return the queries of tokens; of each head the rotary part comes last."""
        config = self.config
        if config.latent.q_dim is None:
            q = self.query(x)
        else:
            q = self.query_up(self.query_norm(self.query_down(x)))
        features = config.head_dim + config.latent.rope_dim
        q_BTNF = q.reshape(*x.shape[:2], config.n_head, features)
        q_BTNH, q_BTNR = jnp.split(q_BTNF, [config.head_dim], -1)
        return jnp.concatenate([q_BTNH, self._apply_rope(q_BTNR, where)], -1)

    def keys_values(self, x: Float[Array, "B S D"], where: TokenMetadata) -> KVCache:
        """Return what keys and values of tokens are made of: what a cache keeps."""
        latent_BSC, rope_key_BSR = jnp.split(self.kv_down(x), [self.kv_dim], -1)
        entries = {
            "latent": self.kv_norm(latent_BSC),
            "rope_key": self._apply_rope(rope_key_BSR[:, :, None], where)[:, :, 0],
        }
        if self.indexer is not None:
            entries["index_key"] = self.indexer.keys(x, where)
        return entries

    def _expanded(
        self, entries: KVCache
    ) -> tuple[Float[Array, "B S N F"], Float[Array, "B S N V"]]:
        """Return the keys and values of all heads."""
        latent, rope_key_BSR = entries["latent"], entries["rope_key"]
        heads = (*latent.shape[:2], self.config.n_head)
        k_BSNH = self.key_up(latent).reshape(*heads, self.config.head_dim)
        k_BSNR = jnp.broadcast_to(rope_key_BSR[:, :, None], (*heads, rope_key_BSR.shape[2]))
        v_BSNV = self.value_up(latent).reshape(*heads, self.config.v_dim)
        return jnp.concatenate([k_BSNH, k_BSNR], -1), v_BSNV

    def _absorbed(self, q_BTNF: Float[Array, "B T N F"]) -> Float[Array, "B T N C"]:
        """Return queries that meet `_shared_key` with the same scores as they do a head's keys."""
        q_BTNH, q_BTNR = jnp.split(q_BTNF, [self.config.head_dim], -1)
        w_CNH = self._up(self.key_up, self.config.head_dim)
        parts = [jnp.einsum("btnh,cnh->btnc", q_BTNH, w_CNH), q_BTNR]
        if self.key_up.bias is not None:
            bias_NH = self.key_up.bias[...].reshape(-1, self.config.head_dim)
            parts.append(
                jnp.einsum("btnh,nh->btn", q_BTNH, bias_NH.astype(q_BTNH.dtype))[..., None]
            )
        return jnp.concatenate(parts, -1)

    def _shared_key(
        self, latent: Float[Array, "*any C"], rope_key: Float[Array, "*any R"]
    ) -> Float[Array, "*any 1 F"]:
        """Return the one key that all heads share; its last feature, 1, meets the keys' bias."""
        ones = [] if self.key_up.bias is None else [jnp.ones_like(latent[..., :1])]
        return jnp.concatenate([latent, rope_key, *ones], -1)[..., None, :]

    def _up(self, layer: Linear, features: int) -> Float[Array, "C N F"]:
        kernel = layer.kernel[...].astype(self.config.dtype)
        return kernel.reshape(kernel.shape[0], self.config.n_head, features)

    def _apply_rope(
        self, x: Float[Array, "B T N R"], where: TokenMetadata
    ) -> Float[Array, "B T N R"]:
        if self.config.positions != "rope":
            return x
        return apply_rope(x, where.positions, dataclasses.replace(self.config.rope, dim=None))
