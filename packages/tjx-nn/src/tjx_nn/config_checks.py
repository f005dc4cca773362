"""Checks of `TransformerConfig`: ranges of numbers, and fields that exclude others.

Importing it needs only the standard library.
"""

import math
from typing import TYPE_CHECKING

from tjx_nn.problems import Problem

if TYPE_CHECKING:
    from tjx_nn.config import TransformerConfig


def field_problems(config: "TransformerConfig") -> list[Problem]:
    """Return the errors of a configuration whose sizes are valid.

    Parameters
    ----------
    config
        The configuration; its sizes are integers in range.
    """
    checks = (
        _check_heads, _check_rope, _check_latent_and_sparse, _check_windows, _check_blocks,
        _check_experts,
    )  # fmt: skip
    return [problem for check in checks for problem in check(config)]


def number_problems(config: "TransformerConfig") -> list[Problem]:
    """Return the errors in floating-point fields.

    Parameters
    ----------
    config
        The configuration.
    """
    problems = [
        Problem(name, f"got {value!r}; expected a probability in [0, 1)")
        for name in ("dropout", "embedding_dropout", "attention_dropout")
        if (value := getattr(config, name)) is not None and not 0 <= value < 1
    ]
    positive = {
        "attention_soft_cap": 50, "attention_scale": 0.125, "layer_scale": 0.1,
        "residual_scale": 1, "init_std": 0.02, "swiglu_limit": 7,
    }  # fmt: skip
    problems += [
        Problem(name, f"got {value!r}; expected a positive number, such as {example}")
        for name, example in positive.items()
        if (value := getattr(config, name)) is not None and not value > 0
    ]
    problems += [
        Problem(name, f"got {value!r}; expected at least 0 and finite, such as {example}")
        for name, example in (("nope_temperature", "0.1"), ("z_loss", "1e-4"))
        if not 0 <= (value := getattr(config, name)) < math.inf
    ]
    if not 0 < config.norm_eps < 1:
        problems.append(
            Problem(
                "norm_eps", f"got {config.norm_eps!r}; expected a number in (0, 1), such as 1e-5"
            )
        )
    return problems


def _check_heads(config: "TransformerConfig") -> list[Problem]:
    """Check the sizes of heads."""
    problems = []
    if config.d_head is None and config.d_model % config.n_head:
        near = max(1, round(config.d_model / config.n_head)) * config.n_head
        problems.append(
            Problem(
                "d_model",
                f"got {config.d_model} with n_head {config.n_head}; expected a multiple of "
                f"n_head; try d_model {near}, or set d_head",
                ("n_head",),
            )
        )
    if config.n_head % config.kv_heads:
        divisors = [k for k in range(1, min(config.n_head, 1024) + 1) if config.n_head % k == 0]
        problems.append(
            Problem(
                "n_kv_head",
                f"got {config.kv_heads} with n_head {config.n_head}; expected a divisor of "
                f"n_head; use one of {divisors}",
                ("n_head",),
            )
        )
    if config.attention_gate is not None and config.attention_gate > config.d_model:
        problems.append(
            Problem(
                "attention_gate",
                f"got {config.attention_gate}; expected at most {config.d_model}, the features of "
                "d_model; use 12",
                ("d_model",),
            )
        )
    return problems


def _check_rope(config: "TransformerConfig") -> list[Problem]:
    """Check rotary embeddings."""
    problems = []
    rotary = config.positions == "rope" and config.latent.kv_dim is None
    if rotary and (config.rope.dim or config.head_dim) > config.head_dim:
        problems.append(
            Problem(
                "rope.dim",
                f"got {config.rope.dim}; expected at most {config.head_dim}, the features of "
                "a head",
            )
        )
    elif rotary and config.rope.dim is None and config.head_dim % 2:
        problems.append(
            Problem(
                "d_head",
                f"got {config.head_dim}; expected an even number for positions 'rope'",
                ("positions",),
            )
        )
    if config.positions == "rope" and config.rope.scaling == "longrope":
        problems += _check_longrope(config)
    if config.latent.kv_dim is not None and config.rope.local_base is not None:
        problems.append(
            Problem(
                "rope.local_base",
                f"got {config.rope.local_base} with latent.kv_dim "
                f"{config.latent.kv_dim}; expected None, as latent attention has one base; omit it",
                ("latent.kv_dim",),
            )
        )
    latent = config.latent
    if latent.kv_dim is not None and config.positions == "rope" and not latent.rope_dim:
        problems.append(
            Problem(
                "latent.rope_dim", "got 0; expected at least 2 for positions 'rope'", ("positions",)
            )
        )
    return problems


def _check_longrope(config: "TransformerConfig") -> list[Problem]:
    """Check the factors of LongRoPE."""
    if config.latent.kv_dim is not None or config.sparse.top_k is not None:
        return [
            Problem(
                "rope.scaling",
                "got 'longrope'; expected another with latent.kv_dim and with "
                "sparse.top_k, whose rotated features are not those of a head",
                ("latent.kv_dim", "sparse.top_k"),
            )
        ]
    pairs = (config.rope.dim or config.head_dim) // 2
    return [
        Problem(
            f"rope.{name}", f"got {count} numbers; expected {pairs}, half of the rotated features"
        )
        for name in ("short_factors", "long_factors")
        if (count := len(getattr(config.rope, name))) != pairs
    ]


def _check_latent_and_sparse(config: "TransformerConfig") -> list[Problem]:
    """Check fields that exclude latent or sparse attention."""
    problems = []
    latent = config.latent.kv_dim is not None
    sparse = config.sparse.top_k is not None and config.sparse.indexer
    if latent and config.n_kv_head not in (None, config.n_head):
        problems.append(
            Problem(
                "n_kv_head",
                f"got {config.n_kv_head} with latent.kv_dim {config.latent.kv_dim}; "
                "expected None, as latent attention has keys for every head; omit it",
                ("latent.kv_dim",),
            )
        )
    if latent and config.qk_norm:
        problems.append(
            Problem(
                "qk_norm",
                f"got True with latent.kv_dim {config.latent.kv_dim}; expected False, as "
                "latent attention has its own norms; omit it",
                ("latent.kv_dim",),
            )
        )
    if config.sparse.top_k is not None and config.attention_implementation is not None:
        problems.append(
            Problem(
                "attention_implementation",
                f"got {config.attention_implementation!r} with sparse.top_k {config.sparse.top_k}; "
                "expected None, as sparse attention has one implementation; omit it",
                ("sparse.top_k",),
            )
        )
    if config.kv_cache_dtype == "int8" and (latent or config.sparse.top_k):
        problems.append(
            Problem(
                "kv_cache_dtype",
                "got 'int8' with latent.kv_dim or sparse.top_k; expected 'model', as "
                "the entries of latent and sparse attention have no int8 form; omit it",
                ("latent.kv_dim", "sparse.top_k"),
            )
        )
    if config.attention_sinks and (latent or sparse):
        problems.append(
            Problem(
                "attention_sinks",
                "got True; expected False with latent.kv_dim and with an indexer "
                "of sparse.top_k, whose attention has no sinks; omit it",
                ("latent.kv_dim", "sparse.top_k"),
            )
        )
    if config.attention_gate is not None and (latent or sparse):
        problems.append(
            Problem(
                "attention_gate",
                f"got {config.attention_gate}; expected None with latent.kv_dim and with an "
                "indexer of sparse.top_k, whose attention has no gate; omit it",
                ("latent.kv_dim", "sparse.top_k"),
            )
        )
    return problems


def _check_windows(config: "TransformerConfig") -> list[Problem]:
    """Check windows and blocks without rotary embeddings."""
    problems = []
    latent = config.latent.kv_dim is not None
    sparse = config.sparse.top_k is not None and config.sparse.indexer
    if config.symmetric_window and config.window is None:
        problems.append(
            Problem(
                "symmetric_window",
                "got True with window None; expected a window; set it, or omit symmetric_window",
                ("window",),
            )
        )
    if config.nope_every is not None and (config.positions != "rope" or latent or sparse):
        problems.append(
            Problem(
                "nope_every",
                f"got {config.nope_every}; expected None without positions 'rope', with "
                "latent.kv_dim and with an indexer of sparse.top_k, whose blocks have the same "
                "positions; omit it",
                ("positions", "latent.kv_dim", "sparse.top_k"),
            )
        )
    if config.nope_every is not None and config.window == config.max_seq_len:
        problems.append(
            Problem(
                "window",
                f"got {config.window}, which is max_seq_len, with nope_every "
                f"{config.nope_every}; expected a smaller window, or None",
                ("max_seq_len", "nope_every"),
            )
        )
    if config.nope_temperature and config.nope_every is None:
        problems.append(
            Problem(
                "nope_temperature",
                f"got {config.nope_temperature} with nope_every None; expected 0; "
                "set nope_every, or omit it",
                ("nope_every",),
            )
        )
    if config.chunked_window and (
        config.window is None or config.symmetric_window or latent or config.sparse.top_k
    ):
        problems.append(
            Problem(
                "chunked_window",
                "got True; expected False without window, with symmetric_window, "
                "with latent.kv_dim and with sparse.top_k; omit it",
                ("window", "symmetric_window", "latent.kv_dim", "sparse.top_k"),
            )
        )
    if config.global_first and config.global_every is None:
        problems.append(
            Problem(
                "global_first",
                "got True with global_every None; expected False; set global_every, or omit it",
                ("global_every",),
            )
        )
    return problems


def _check_blocks(config: "TransformerConfig") -> list[Problem]:
    """Check norms, scales and the layout of blocks."""
    problems = []
    if config.parallel_block and config.norm_position != "pre":
        problems.append(
            Problem(
                "parallel_block",
                f"got True with norm_position {config.norm_position!r}; expected "
                "norm_position 'pre'",
                ("norm_position",),
            )
        )
    if config.norm_unit_offset and config.norm != "rmsnorm":
        problems.append(
            Problem(
                "norm_unit_offset",
                f"got True with norm {config.norm!r}; expected norm 'rmsnorm'",
                ("norm",),
            )
        )
    if not config.first_norm and (
        config.norm_position != "pre" or config.parallel_block or config.experts.count
    ):
        problems.append(
            Problem(
                "first_norm",
                f"got False with norm_position {config.norm_position!r}, parallel_block "
                f"{config.parallel_block} and experts.count {config.experts.count}; expected "
                "True, or 'pre', False and 0",
                ("norm_position", "parallel_block", "experts.count"),
            )
        )
    if not config.first_norm and config.n_layer < 2:
        problems.append(
            Problem(
                "first_norm",
                f"got False with n_layer {config.n_layer}; expected at least 2 blocks",
                ("n_layer",),
            )
        )
    if config.qk_norm_position == "after_rope" and (
        not config.qk_norm or config.positions != "rope" or config.qk_norm_features == "all"
    ):
        problems.append(
            Problem(
                "qk_norm_position",
                "got 'after_rope'; expected 'before_rope' without qk_norm, "
                "without positions 'rope' and with qk_norm_features 'all'",
                ("qk_norm", "positions", "qk_norm_features"),
            )
        )
    if config.attention_scale is not None and config.mup_base is not None:
        problems.append(
            Problem(
                "attention_scale",
                f"got {config.attention_scale!r} with mup_base {config.mup_base}; "
                "expected None, as muP sets the scale; omit it",
                ("mup_base",),
            )
        )
    return problems


def _check_experts(config: "TransformerConfig") -> list[Problem]:
    """Check mixtures of experts."""
    problems = []
    if config.float8 and config.experts.count:
        problems.append(
            Problem(
                "float8",
                f"got True with experts.count {config.experts.count}; expected False, as "
                "expert products have no FP8 implementation; omit it",
                ("experts.count",),
            )
        )
    if config.experts.count and config.experts.first_layer >= config.n_layer:
        problems.append(
            Problem(
                "experts.first_layer",
                f"got {config.experts.first_layer} with n_layer {config.n_layer}; "
                f"expected at most {config.n_layer - 1}",
                ("n_layer",),
            )
        )
    every, first = config.experts.every, config.experts.first_layer
    if config.experts.count and every > 1 and (config.n_layer % every or first):
        problems.append(
            Problem(
                "experts.every",
                f"got {every} with n_layer {config.n_layer} and experts.first_layer "
                f"{first}; expected a divisor of n_layer, and first_layer 0",
                ("n_layer", "experts.first_layer"),
            )
        )
    return problems
