"""Multi-head latent attention (MLA): keys and values of all heads are projections of one latent.

The KV cache holds only the latent and a rotary key that all heads share.

Axes in names: B batch, T time, S keys (of a cache: its slots), P keys selected by the indexer,
D d_model, N heads, H head_dim without the rotary part, R rotary part, V head_dim of values,
C latent, F features.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.attention.indexer import Indexer, select_cached_keys
from tjx_nn.attention.kv_cache import KVCache, cached_attention, update_cache
from tjx_nn.attention.mha import attention_scale, merge_heads, model_alibi_slopes, split_heads
from tjx_nn.attention.sparse import attend_selected, attend_top_k, sparse_attention
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import Linear
from tjx_nn.layers.make_layers import linear, make_norm
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.position_encoding import apply_rope
from tjx_nn.layers.scan_layers import AuxLosses
from tjx_nn.layout import ShardedModule


class LatentAttention(ShardedModule):
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

    Queries and keys concatenate two parts: one from the latent, without positions, and a rotary one
    from the residual stream. With `sparse.top_k` an indexer selects the keys, as in DeepSeek-V3.2,
    or the attention scores.

    Parameters
    ----------
    config
        Configuration of the model; `config.latent.kv_dim` must be set.
    causal
        Whether a token attends only to itself and to earlier tokens.
    rngs
        Source of random initial values.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, LatentAttention, LatentConfig
    >>> config = GPTConfig(n_head=2, d_model=8, latent=LatentConfig(kv_dim=6, rope_dim=2))
    >>> out, cache, _ = LatentAttention(config, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8)))
    >>> out.shape, cache["latent"].shape
    ((1, 3, 8), (1, 3, 6))
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = True, rngs: nnx.Rngs) -> None:
        latent = config.latent
        assert latent.kv_dim is not None
        self.config, self.causal, self.kv_dim = config, causal, latent.kv_dim
        d, n, c = config.d_model, config.n_head, latent.kv_dim
        q_dim = n * (config.head_dim + latent.rope_dim)
        project = partial(linear, config, rngs=rngs, bias=config.has_qkv_bias)
        if latent.q_dim is None:
            self.query = project(("embed", "heads"), (d, q_dim))
        else:
            self.query_down = project(("embed", "latent"), (d, latent.q_dim))
            self.query_norm = self._make_norm(latent.q_dim)
            self.query_up = project(("latent", "heads"), (latent.q_dim, q_dim))
        self.kv_down = project(("embed", "latent"), (d, c + latent.rope_dim))
        self.kv_norm = self._make_norm(c)
        self.key_up = project(("latent", "heads"), (c, n * config.head_dim))
        self.value_up = project(("latent", "heads"), (c, n * config.v_dim))
        out = (n * config.v_dim, d)
        self.out = linear(config, ("heads", "embed"), out, residual=True, rngs=rngs)
        indexed = config.sparse.top_k is not None and config.sparse.indexer
        self.indexer = Indexer(config, rngs=rngs) if indexed else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        window: int | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, AuxLosses]:
        """Compute latent self-attention without a bias of scores; parameters as for `Attention`.

        Returns
        -------
        out
            Output of the layer, same shape as `x`.
        cache
            KV cache entries of these tokens: "latent", "rope_key", and "index_key" with an indexer.
        aux_losses
            As from `sparse_attention` with an indexer, otherwise empty.
        """
        assert bias is None  # the configuration excludes it
        config = self.config
        cache = self.keys_values(x, positions)
        q_BTNF, (k_BSNF, v_BSNV) = self.queries(x, positions), self._expand(cache)
        if config.sparse.top_k is not None:
            indexer = self.indexer
            index = None if indexer is None else indexer(x, positions, cache["index_key"])
            out_BTNV, aux_losses = sparse_attention(
                config, q_BTNF, k_BSNF, v_BSNV, index, segment_ids,
                causal=self.causal, window=window, dropout_key=dropout_key,
            )  # fmt: skip
            return self.out(merge_heads(out_BTNV)), cache, aux_losses
        rate = config.attention_dropout if dropout_key is not None else 0.0
        with jax.named_scope("attention"):  # profiles group operations by this scope
            out_BTNV = self.layout.attend(
                q_BTNF,
                k_BSNF,
                v_BSNV,
                causal=self.causal,
                q_segment_ids=segment_ids,
                kv_segment_ids=segment_ids,
                window=window,
                symmetric_window=config.symmetric_window and bool(window) and not self.causal,
                soft_cap=config.attention_soft_cap,
                scale=attention_scale(config, q_BTNF.shape[3]),
                alibi_slopes=model_alibi_slopes(config),
                dropout_rate=rate,
                dropout_key=dropout_key if rate else None,
                implementation=config.attention_implementation,
            )
        return self.out(merge_heads(out_BTNV)), cache, {}

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        positions: Int[Array, "B T"],
        *,
        window: int | None = None,
        bias: Float[Array, "B N T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend from new tokens to the KV cache; parameters and result as `Attention.decode`.

        The up-projections are absorbed: q . (W c) is (W^T q) . c, and a sum of values is the value
        of a sum of latents. The latent serves as the single key and value head.

        Parameters
        ----------
        x, cache, positions, window, bias
            As for `Attention.decode`; the cache holds latents and rotary keys, and bias is None.

        Returns
        -------
        out : array [batch, tokens, d_model]
            Output of the layer.
        cache : dict
            The KV cache with the new tokens.
        """
        assert bias is None  # the configuration excludes it
        config = self.config
        cache = update_cache(cache, self.keys_values(x, positions), positions)
        q_BTNF = self.queries(x, positions)
        scale = attention_scale(config, q_BTNF.shape[3])
        q_BTNC = self._absorb(q_BTNF)
        if config.sparse.top_k is None:
            latent_BTNC = cached_attention(
                q_BTNC,
                self._shared_key(cache["latent"], cache["rope_key"]),
                cache["latent"][:, :, None],
                positions,
                window=window,
                soft_cap=config.attention_soft_cap,
                scale=scale,
                alibi_slopes=model_alibi_slopes(config),
            )
        elif self.indexer is None:
            k_BS1C = self._shared_key(cache["latent"], cache["rope_key"])
            latent_BTNC = attend_top_k(
                config, q_BTNC, k_BS1C, cache["latent"][:, :, None], positions,
                window=window, scale=scale,
            )  # fmt: skip
        else:
            index = self.indexer(x, positions, cache["index_key"])
            selected = select_cached_keys(config, index, positions, window)
            latent_BTPC = selected.gather(cache["latent"])
            k_BTP1C = self._shared_key(latent_BTPC, selected.gather(cache["rope_key"]))
            v_BTP1C = latent_BTPC[..., None, :]
            latent_BTNC = attend_selected(config, q_BTNC, k_BTP1C, v_BTP1C, selected, scale=scale)
        w_CNV = self._up_kernel(self.value_up, config.v_dim)
        out_BTNV = jnp.einsum("btnc,cnv->btnv", latent_BTNC, w_CNV)
        if self.value_up.bias is not None:  # attention weights sum to 1
            bias_NV = self.value_up.bias[...].reshape(-1, config.v_dim)
            out_BTNV = out_BTNV + bias_NV.astype(out_BTNV.dtype)[None, None]
        return self.out(merge_heads(out_BTNV)), cache

    def queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None
    ) -> Float[Array, "B T N F"]:
        """Project tokens to queries; the rotary part is the last `rope_dim` features of a head.

        Parameters
        ----------
        x, positions
            As for `Attention.queries`.

        Returns
        -------
        array [batch, tokens, heads, nope_dim + rope_dim]
            The queries.
        """
        config = self.config
        if config.latent.q_dim is None:
            q = self.query(x)
        else:
            latent = self.query_down(x)
            q = self.query_up(latent if self.query_norm is None else self.query_norm(latent))
        q_BTNF = split_heads(q, config.head_dim + config.latent.rope_dim)
        if not config.latent.rope_dim:  # programs that read ONNX reject empty arrays
            return q_BTNF
        q_BTNH, q_BTNR = jnp.split(q_BTNF, [config.head_dim], -1)
        return jnp.concatenate([q_BTNH, self._apply_rope(q_BTNR, positions)], -1)

    def keys_values(
        self, x: Float[Array, "B S D"], positions: Int[Array, "#B S"] | None
    ) -> KVCache:
        """Project tokens to the entries of the KV cache.

        Parameters
        ----------
        x, positions
            As for `Attention.keys_values`.

        Returns
        -------
        dict
            Latents and rotary keys of the tokens.
        """
        latent_BSC, rope_key_BSR = jnp.split(self.kv_down(x), [self.kv_dim], -1)
        entries = {
            "latent": latent_BSC if self.kv_norm is None else self.kv_norm(latent_BSC),
            "rope_key": self._apply_rope(rope_key_BSR[:, :, None], positions)[:, :, 0],
        }
        if self.indexer is not None:
            entries["index_key"] = self.indexer.keys(x, positions)
        return entries

    def _expand(self, cache: KVCache) -> tuple[Float[Array, "B S N F"], Float[Array, "B S N V"]]:
        """Project cache entries to the keys and values of all heads."""
        latent, rope_key_BSR = cache["latent"], cache["rope_key"]
        heads = (*latent.shape[:2], self.config.n_head)
        k_BSNH = split_heads(self.key_up(latent), self.config.head_dim)
        v_BSNV = split_heads(self.value_up(latent), self.config.v_dim)
        if not rope_key_BSR.shape[2]:
            return k_BSNH, v_BSNV
        k_BSNR = jnp.broadcast_to(rope_key_BSR[:, :, None], (*heads, rope_key_BSR.shape[2]))
        return jnp.concatenate([k_BSNH, k_BSNR], -1), v_BSNV

    def _absorb(self, q_BTNF: Float[Array, "B T N F"]) -> Float[Array, "B T N C"]:
        """Absorb the key up-projection into queries, so that they match `_shared_key`."""
        q_BTNH, q_BTNR = jnp.split(q_BTNF, [self.config.head_dim], -1)
        w_CNH = self._up_kernel(self.key_up, self.config.head_dim)
        features = [jnp.einsum("btnh,cnh->btnc", q_BTNH, w_CNH), q_BTNR]
        if self.key_up.bias is not None:
            bias_NH = self.key_up.bias[...].reshape(-1, self.config.head_dim)
            features.append(
                jnp.einsum("btnh,nh->btn", q_BTNH, bias_NH.astype(q_BTNH.dtype))[..., None]
            )
        return jnp.concatenate(features, -1)

    def _shared_key(
        self, latent: Float[Array, "*any C"], rope_key: Float[Array, "*any R"]
    ) -> Float[Array, "*any 1 F"]:
        """Return the key that all heads share; its last feature, 1, multiplies the key bias."""
        ones = [] if self.key_up.bias is None else [jnp.ones_like(latent[..., :1])]
        return jnp.concatenate([latent, rope_key, *ones], -1)[..., None, :]

    def _up_kernel(self, layer: Linear, features: int) -> Float[Array, "C N F"]:
        kernel = layer.kernel[...].astype(self.config.dtype)
        return rearrange(kernel, "c (n f) -> c n f", f=features)

    def _apply_rope(
        self, x: Float[Array, "B T N R"], positions: Array | None
    ) -> Float[Array, "B T N R"]:
        if self.config.positions != "rope":
            return x
        groups = self.config.latent.rope_heads
        by_group = rearrange(x, "b t n (g r) -> b t (n g) r", g=groups)
        rotated = apply_rope(by_group, positions, dataclasses.replace(self.config.rope, dim=None))
        return rearrange(rotated, "b t (n g) r -> b t n (g r)", g=groups)

    def _make_norm(self, features: int) -> LayerNorm | RMSNorm | None:
        return (
            make_norm(self.config, features, axis="latent") if self.config.latent.use_norm else None
        )
