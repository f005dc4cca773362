"""What each attention implementation supports, as a table made from their own answers."""

from dataclasses import replace

from tjx_kernels.arguments import DTYPES
from tjx_kernels.attention import IMPLEMENTATIONS
from tjx_kernels.attention_call import AttentionCall, Implementation
from tjx_kernels.target import Target

_PLAIN = AttentionCall(
    batch=2,
    q_len=1024,
    kv_len=1024,
    heads=8,
    kv_heads=8,
    head_dim=64,
    v_head_dim=64,
    dtype="bfloat16",
    causal=True,
    window=None,
    soft_cap=None,
    scale=0.125,
    dropout_rate=0.0,
    segment_ids=False,
    alibi=False,
    bias=None,
    q_offset=0,
    return_lse=False,
    platform="cpu",
    architecture="",
    interpret=False,
)

_TARGETS = {
    "CPU": Target("cpu", ""),
    "NVIDIA Ampere (sm_80)": Target("gpu", "sm_80"),
    "NVIDIA Hopper (sm_90)": Target("gpu", "sm_90"),
    "NVIDIA Blackwell (sm_100)": Target("gpu", "sm_100"),
    "TPU": Target("tpu", "TPU v5 lite"),
}

_FEATURES: dict[str, AttentionCall] = {
    **{dtype: replace(_PLAIN, dtype=dtype) for dtype in DTYPES},
    **{
        f"head_dim {dim}": replace(_PLAIN, head_dim=dim, v_head_dim=dim)
        for dim in (64, 80, 96, 128, 256)
    },
    "another head_dim of values": replace(_PLAIN, head_dim=192, v_head_dim=128),
    "not causal": replace(_PLAIN, causal=False),
    "q_offset": replace(_PLAIN, q_offset=512),
    "q_offset known when it runs": replace(_PLAIN, q_offset=None),
    "segment ids": replace(_PLAIN, segment_ids=True),
    "sliding window": replace(_PLAIN, window=256),
    "soft cap": replace(_PLAIN, soft_cap=30.0),
    "grouped heads (GQA, MQA)": replace(_PLAIN, kv_heads=2),
    "lengths 1 and odd": replace(_PLAIN, q_len=1, kv_len=1001),
    "log-sum-exp, differentiable": replace(_PLAIN, return_lse=True),
    "ALiBi slopes": replace(_PLAIN, alibi=True),
    "bias, with its gradient": replace(_PLAIN, bias=(1, 8)),
    "dropout": replace(_PLAIN, dropout_rate=0.1),
}


def support_table() -> str:
    """Return a Markdown table: a row for each feature, a column for each implementation.

    The features are asked for on the first device that an implementation supports; the reasons for
    a "no" follow below the table.

    Examples
    --------
    >>> print(support_table().splitlines()[0])
    | | triton | mosaic_gpu | cudnn | tpu | xla | reference |
    """
    lines = [
        f"| | {' | '.join(IMPLEMENTATIONS)} |",
        f"|---|{'---|' * len(IMPLEMENTATIONS)}",
    ]
    notes: dict[str, int] = {}

    def answer(reason: str | None) -> str:
        return "yes" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})"

    for name, target in _TARGETS.items():
        call = _on(_PLAIN, target)
        answers = (answer(entry.supports(call)) for entry in IMPLEMENTATIONS.values())
        lines.append(f"| on {name} | {' | '.join(answers)} |")
    homes = [_home(entry) for entry in IMPLEMENTATIONS.values()]
    for feature, call in _FEATURES.items():
        reasons = (
            entry.supports(_on(call, home))
            for entry, home in zip(IMPLEMENTATIONS.values(), homes, strict=True)
        )
        lines.append(f"| {feature} | {' | '.join(answer(reason) for reason in reasons)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())])


def _on(call: AttentionCall, target: Target) -> AttentionCall:
    return replace(call, platform=target.platform, architecture=target.architecture)


def _home(entry: Implementation) -> Target:
    """Find the first kind of device that serves a plain call; the dearest of NVIDIA's first."""
    order = ("NVIDIA Hopper (sm_90)", *_TARGETS)
    return next(
        _TARGETS[name] for name in order if entry.supports(_on(_PLAIN, _TARGETS[name])) is None
    )
