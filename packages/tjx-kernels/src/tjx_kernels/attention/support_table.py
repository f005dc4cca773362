"""What each attention implementation supports, as a table made from their own answers."""

from dataclasses import replace

from tjx_kernels.attention.api import BACKENDS
from tjx_kernels.attention.arguments import DTYPES
from tjx_kernels.attention.types import PLAIN, AttentionBackend, AttentionCall
from tjx_kernels.target import Target

_TARGETS = {
    "CPU": Target("cpu", ""),
    "NVIDIA Ampere (sm_80)": Target("gpu", "sm_80"),
    "NVIDIA Hopper (sm_90)": Target("gpu", "sm_90"),
    "NVIDIA Blackwell (sm_100)": Target("gpu", "sm_100"),
    "TPU": Target("tpu", "TPU v5 lite"),
}

_FEATURES: dict[str, AttentionCall] = {
    **{dtype: replace(PLAIN, dtype=dtype) for dtype in DTYPES},
    **{
        f"head_dim {dim}": replace(PLAIN, head_dim=dim, v_head_dim=dim)
        for dim in (64, 80, 96, 128, 256)
    },
    "another head_dim of values": replace(PLAIN, head_dim=192, v_head_dim=128),
    "not causal": replace(PLAIN, causal=False),
    "q_offset": replace(PLAIN, q_offset=512),
    "q_offset known when it runs": replace(PLAIN, q_offset=None),
    "segment ids": replace(PLAIN, segment_ids=True),
    "sliding window": replace(PLAIN, window=256),
    "soft cap": replace(PLAIN, soft_cap=30.0),
    "grouped heads (GQA, MQA)": replace(PLAIN, kv_heads=2),
    "lengths 1 and odd": replace(PLAIN, q_len=1, kv_len=1001),
    "log-sum-exp, differentiable": replace(PLAIN, return_lse=True),
    "ALiBi slopes": replace(PLAIN, alibi=True),
    "bias, with its gradient": replace(PLAIN, bias=(1, 8)),
    "dropout": replace(PLAIN, dropout_rate=0.1),
    "deterministic backward (`--xla_gpu_deterministic_ops=true`)": replace(
        PLAIN, deterministic=True
    ),
}


def support_table() -> str:
    """Return a Markdown table: a row for each feature, a column for each implementation.

    The features are asked for on the first device that an implementation supports; the reasons for
    a "no" follow below the table.

    Examples
    --------
    >>> print(support_table().splitlines()[0])
    | | cudnn | triton | mosaic_gpu | tpu | xla | reference |
    """
    lines = [
        f"| | {' | '.join(BACKENDS)} |",
        f"|---|{'---|' * len(BACKENDS)}",
    ]
    notes: dict[str, int] = {}

    def answer(reason: str | None) -> str:
        return "yes" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})"

    for name, target in _TARGETS.items():
        call = _on(PLAIN, target)
        answers = (answer(entry.supports(call)) for entry in BACKENDS.values())
        lines.append(f"| on {name} | {' | '.join(answers)} |")
    homes = [_home(entry) for entry in BACKENDS.values()]
    for feature, call in _FEATURES.items():
        reasons = (
            entry.supports(_on(call, home))
            for entry, home in zip(BACKENDS.values(), homes, strict=True)
        )
        lines.append(f"| {feature} | {' | '.join(answer(reason) for reason in reasons)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())])


def _on(call: AttentionCall, target: Target) -> AttentionCall:
    return replace(call, platform=target.platform, architecture=target.architecture)


def _home(entry: AttentionBackend) -> Target:
    """Find the first kind of device that serves a plain call; the dearest of NVIDIA's first."""
    order = ("NVIDIA Hopper (sm_90)", *_TARGETS)
    return next(
        _TARGETS[name] for name in order if entry.supports(_on(PLAIN, _TARGETS[name])) is None
    )
