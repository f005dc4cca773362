"""Conversion of trained multi-head and grouped-query attention to latent attention (MLA).

Meng et al. 2025, "TransMLA: Multi-Head Latent Attention Is All You Need". All key heads become one
key that every query head reads: query and key of a head rotate by the same angles, so an orthogonal
mix of the key heads, one for each frequency, leaves every score as it is (RoRoPE, section 4.2).
Keys without rotation and values are then projections of their leading singular vectors.

Axes in names: D d_model, N query heads, K key heads, M mixed key heads, H head_dim, R rotated
features of a head, C latent, J features that the latent replaces.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange

from tjx_nn.attention.mha import attention_scale
from tjx_nn.binding import Params, check_params
from tjx_nn.layers.position_encoding import rope_frequencies
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import raise_problems
from tjx_nn.sub_configs import LatentConfig


def to_latent_attention(
    config: GPTConfig, params: Params, rank: int | None = None, *, rope_heads: int | None = None
) -> tuple[GPTConfig, Params]:
    """Convert the attention of a trained decoder to latent attention, by singular values.

    At full rank the logits are those of the model, up to rounding. A smaller rank keeps the leading
    singular vectors of keys and values, and fewer `rope_heads` rotate the leading mixed key heads
    only; train the result further to regain its loss.

    Parameters
    ----------
    config
        Configuration of a decoder with multi-head or grouped-query attention.
    params
        Its parameters, as from `init`.
    rank
        Features of the latent, `latent.kv_dim`; None is the full rank.
    rope_heads
        Mixed key heads that keep their rotary embeddings; None is all, which is exact. The latent
        holds the others, without rotation. Only for positions "rope".

    Returns
    -------
    config : GPTConfig
        Configuration with `latent`. The KV cache holds `latent.kv_dim + latent.rope_dim` features
        of a token and layer, before it 2 * kv_heads * head_dim.
    params : dict
        Parameters of the new configuration; attention kernels are NumPy arrays.

    Raises
    ------
    ValueError
        If the model has qk_norm, attention sinks, nope_every, a local base of RoPE or an indexer,
        which latent attention has no equal of; if the rank exceeds the full rank; or if the
        kernels are quantized.

    Examples
    --------
    >>> from tjx_nn import GPTConfig, init, to_latent_attention
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = init(config, jax.random.key(0))
    >>> latent_config, latent_params = to_latent_attention(config, params, rank=3)
    >>> latent_config.latent.kv_dim, latent_params["blocks"]["attention"]["kv_down"]["kernel"].shape
    (3, (2, 4, 3))
    """
    sizes = _check(config, rank, rope_heads)
    check_params(config, params)
    new = dataclasses.replace(
        config,
        n_kv_head=None,
        rope=dataclasses.replace(config.rope, dim=None),
        latent=LatentConfig(
            kv_dim=sizes.rank,
            rope_dim=sizes.rope_heads * sizes.rotated,
            rope_heads=max(sizes.rope_heads, 1),
            use_norm=False,
        ),
    )

    def convert(blocks: Params) -> Params:
        attention = jax.device_get(blocks["attention"])
        if not isinstance(attention["query"]["kernel"], np.ndarray):
            raise ValueError("params: got quantized kernels; convert first, then quantize")
        layers = [
            _convert_layer(config, new, sizes, jax.tree.map(lambda p, i=i: p[i], attention))
            for i in range(len(attention["out"]["kernel"]))
        ]
        stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
        return {**blocks, "attention": stacked | {"out": attention["out"]}}

    converted = dict(params)
    for name in ("dense_blocks", "blocks"):
        if name in params:
            converted[name] = convert(params[name])
    if "multi_token" in params:
        module = params["multi_token"]
        converted["multi_token"] = {**module, "blocks": convert(module["blocks"])}
    return new, converted


class _Sizes(NamedTuple):
    """Sizes of the converted attention.

    Attributes
    ----------
    rank
        Features of the latent.
    rope_heads
        Mixed key heads with rotary embeddings.
    rotated
        Rotated features of a head.
    """

    rank: int
    rope_heads: int
    rotated: int


def _check(config: GPTConfig, rank: int | None, rope_heads: int | None) -> _Sizes:
    if not isinstance(config, GPTConfig):
        raise ValueError(f"config: got a {type(config).__name__}; expected a GPTConfig")
    unsupported = {
        "latent.kv_dim": config.latent.kv_dim,
        "qk_norm": config.qk_norm or None,
        "attention_sinks": config.attention_sinks or None,
        "attention_gate": config.attention_gate,
        "value_mix": None if config.value_mix == "none" else config.value_mix,
        "nope_every": config.nope_every,
        "rope.local_base": config.rope.local_base if config.positions == "rope" else None,
        "sparse.top_k": config.sparse.top_k if config.sparse.indexer else None,
    }
    problems = [
        f"{name}: got {value}; expected a model without it, as latent attention cannot compute "
        "the same scores"
        for name, value in unsupported.items()
        if value is not None
    ]
    rotary = config.positions == "rope"
    rotated = (config.rope.dim or config.head_dim) if rotary else 0
    most = config.kv_heads if rotary else 0
    kept = most if rope_heads is None else rope_heads
    if not (min(most, 1) <= kept <= most):
        allowed = f"1 to {most}, the key heads" if rotary else "None without rotary embeddings"
        problems.append(f"rope_heads: got {rope_heads}; expected {allowed}")
    features = 2 * config.kv_heads * config.head_dim - kept * rotated
    full = min(config.d_model, features)
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        problems.append(f"rank: got {rank}; expected 1 to {full}, the full rank")
    raise_problems(problems)
    return _Sizes(rank, kept, rotated)


def _convert_layer(config: GPTConfig, new: GPTConfig, sizes: _Sizes, layer: Params) -> Params:
    """Convert the parameters of one layer, in float64."""
    dtype = layer["query"]["kernel"].dtype
    kept, rotated = sizes.rope_heads, sizes.rotated
    # The bias is one more row of each kernel; the last rows of results are biases again.
    biased = config.has_qkv_bias
    q_DNH, k_DKH, v_DKH = (
        rearrange(_with_bias(layer[name]), "d (n h) -> d n h", h=config.head_dim)
        for name in ("query", "key", "value")
    )
    groups = config.n_head // config.kv_heads
    mix_RKM = _mix_key_heads(config, k_DKH[: config.d_model, :, :rotated])
    k_DMR = np.einsum("dkr,rkm->dmr", k_DKH[..., :rotated], mix_RKM)
    nope_DJ = np.concatenate([_flat(k_DMR[:, kept:]), _flat(k_DKH[..., rotated:])], -1)
    down_DC, nope_CJ, v_CJ = _factorize(nope_DJ, _flat(v_DKH), sizes.rank, config.d_model)

    def expand_keys(nope: np.ndarray) -> np.ndarray:
        """Return the keys without rotation of every query head, [..., N * H]."""
        mixed, rest = np.split(nope, [(config.kv_heads - kept) * rotated], -1)
        mixed = mixed.reshape(len(nope), config.kv_heads - kept, rotated)
        k_CKR = np.einsum("cmr,rkm->ckr", mixed, mix_RKM[..., kept:])
        if rotated:  # YaRN scales rotated queries and keys
            k_CKR = k_CKR * rope_frequencies(config.rope, rotated)[1] ** 2
        k_CKH = np.concatenate([k_CKR, rest.reshape(len(nope), config.kv_heads, -1)], -1)
        return _flat(np.repeat(k_CKH, groups, 1))

    def expand_values(v: np.ndarray) -> np.ndarray:
        by_head = v.reshape(len(v), config.kv_heads, config.head_dim)
        return _flat(np.repeat(by_head, groups, 1))

    scale = attention_scale(config, config.head_dim)
    scale /= attention_scale(new, new.head_dim + new.latent.rope_dim)
    q_DNMR = np.einsum(
        "dnr,rnm->dnmr", q_DNH[..., :rotated], np.repeat(mix_RKM, groups, 1)[..., :kept]
    )
    q_DNF = np.concatenate([q_DNH, rearrange(q_DNMR, "d n m r -> d n (m r)")], -1)
    rope_DR = _flat(k_DMR[:, :kept])
    no_bias_1C = np.zeros((1, sizes.rank))
    d = config.d_model
    kernels = {
        "query": scale * _flat(q_DNF),
        "kv_down": np.concatenate(
            [np.concatenate([down_DC, no_bias_1C]) if biased else down_DC, rope_DR], -1
        ),
        "key_up": expand_keys(np.concatenate([nope_CJ, nope_DJ[d:]])),
        "value_up": expand_values(np.concatenate([v_CJ, _flat(v_DKH)[d:]])),
    }
    return {
        name: {"kernel": (kernel[:-1] if biased else kernel).astype(dtype)}
        | ({"bias": kernel[-1].astype(dtype)} if biased else {})
        for name, kernel in kernels.items()
    }


def _with_bias(linear: Params) -> np.ndarray:
    """Return a kernel in float64, with the bias as its last row if there is one."""
    rows = [linear["kernel"], *([linear["bias"][None]] if "bias" in linear else [])]
    return np.concatenate([np.asarray(row, np.float64) for row in rows])


def _flat(x: np.ndarray) -> np.ndarray:
    """Concatenate the features of all heads."""
    return x.reshape(len(x), -1)


def _mix_key_heads(config: GPTConfig, k_DKR: np.ndarray) -> np.ndarray:
    """Return orthogonal matrices over key heads [R, K, M], leading singular vectors first.

    Both features of a pair, which rotate together, have the same matrix.
    """
    rotated = k_DKR.shape[2]
    pair = "(p two)" if config.rope.interleaved else "(two p)"
    pairs = rearrange(k_DKR, f"d k {pair} -> p (d two) k", two=2, p=rotated // 2)
    mix_PKM = np.linalg.svd(pairs, full_matrices=False)[2].swapaxes(1, 2)
    return np.repeat(mix_PKM, 2, 0) if config.rope.interleaved else np.tile(mix_PKM, (2, 1, 1))


def _factorize(
    k_DJ: np.ndarray, v_DJ: np.ndarray, rank: int, d_model: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factorize kernels of keys and values into a common down-projection and two up-projections.

    Both kernels count equally, whatever their norms are (TransMLA, section 4.3). Rows from
    `d_model` on are biases, which are not factorized.
    """
    weights_J = np.concatenate([
        np.full(x.shape[1], 1 / (np.linalg.norm(x[:d_model]) or 1.0)) for x in (k_DJ, v_DJ)
    ])  # fmt: skip
    kernel_DJ = np.concatenate([k_DJ, v_DJ], -1)[:d_model] * weights_J
    vectors_CJ = np.linalg.svd(kernel_DJ, full_matrices=False)[2][:rank]
    k_CJ, v_CJ = np.split(vectors_CJ / weights_J, [k_DJ.shape[1]], -1)
    return kernel_DJ @ vectors_CJ.T, k_CJ, v_CJ
