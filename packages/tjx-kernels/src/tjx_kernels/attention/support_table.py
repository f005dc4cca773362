"""Markdown table of the features that each attention backend supports."""

from dataclasses import replace

from tjx_kernels.attention.backend import AttentionBackend
from tjx_kernels.attention.call import DTYPES, AttentionCall
from tjx_kernels.attention.registry import backends
from tjx_kernels.target import Target

_TARGETS = {
    "CPU": Target("cpu", ""),
    "NVIDIA Ampere (sm_80)": Target("gpu", "sm_80"),
    "NVIDIA Hopper (sm_90)": Target("gpu", "sm_90"),
    "NVIDIA Blackwell (sm_100)": Target("gpu", "sm_100"),
    "TPU": Target("tpu", "TPU v5 lite"),
}

# A causal call without further options. Every backend supports it on its own platforms.
PLAIN = AttentionCall(
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
    "symmetric sliding window": replace(PLAIN, causal=False, window=256, symmetric_window=True),
    "soft cap": replace(PLAIN, soft_cap=30.0),
    "grouped heads (GQA, MQA)": replace(PLAIN, kv_heads=2),
    "lengths 1 and odd": replace(PLAIN, q_len=1, kv_len=1001),
    "log-sum-exp, differentiable": replace(PLAIN, return_lse=True),
    "mask function": replace(PLAIN, mask=lambda *indices: indices[3] < 9),
    "ALiBi slopes": replace(PLAIN, alibi=True),
    "bias, with its gradient": replace(PLAIN, bias=(1, 8)),
    "dropout": replace(PLAIN, dropout_rate=0.1),
    "deterministic backward (`--xla_gpu_deterministic_ops=true`)": replace(
        PLAIN, deterministic=True
    ),
}


def support_table() -> str:
    """Return a Markdown table with a row for each feature and a column for each backend.

    A feature is tested on the first device that the backend supports; footnotes give the reasons
    for each "no".

    Examples
    --------
    >>> print(support_table().splitlines()[0])
    | | cudnn | triton | mosaic_gpu | tpu | xla | reference |
    """
    entries = backends()
    lines = [
        f"| | {' | '.join(entries)} |",
        f"|---|{'---|' * len(entries)}",
    ]
    notes: dict[str, int] = {}

    def cell(reason: str | None) -> str:
        return "yes" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})"

    for name, target in _TARGETS.items():
        call = _on(PLAIN, target)
        cells = (cell(entry.refusal(call)) for entry in entries.values())
        lines.append(f"| on {name} | {' | '.join(cells)} |")
    devices = [_first_device(entry) for entry in entries.values()]
    for feature, call in _FEATURES.items():
        reasons = (
            entry.refusal(_on(call, device))
            for entry, device in zip(entries.values(), devices, strict=True)
        )
        lines.append(f"| {feature} | {' | '.join(cell(reason) for reason in reasons)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())])


def _on(call: AttentionCall, target: Target) -> AttentionCall:
    return replace(call, platform=target.platform, architecture=target.architecture)


def _first_device(entry: AttentionBackend) -> Target:
    """Return the first device on which the backend supports a plain call, Hopper first."""
    order = ("NVIDIA Hopper (sm_90)", *_TARGETS)
    return next(
        _TARGETS[name] for name in order if entry.refusal(_on(PLAIN, _TARGETS[name])) is None
    )
