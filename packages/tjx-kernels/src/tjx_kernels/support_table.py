"""What each attention implementation supports, as a table made from their own answers."""

from dataclasses import replace

from tjx_kernels.attention import IMPLEMENTATIONS, implementations_for
from tjx_kernels.attention_call import DTYPES, AttentionCall

_PLAIN = AttentionCall(
    batch=2,
    q_len=1024,
    kv_len=1024,
    heads=8,
    kv_heads=8,
    head_dim=64,
    dtype="float32",
    causal=False,
    window=None,
    soft_cap=None,
    scale=0.125,
    segment_ids=False,
    q_offset=0,
    platform="cpu",
)

_FEATURES: dict[str, AttentionCall] = {
    **{f"on {platform}": replace(_PLAIN, platform=platform) for platform in ("cpu", "gpu", "tpu")},
    **{dtype: replace(_PLAIN, dtype=dtype) for dtype in DTYPES},
    **{f"head_dim {dim}": replace(_PLAIN, head_dim=dim) for dim in (64, 80, 96, 128, 256)},
    "causal": replace(_PLAIN, causal=True),
    "q_offset known when it runs": replace(_PLAIN, causal=True, q_offset=None),
    "segment ids": replace(_PLAIN, segment_ids=True),
    "sliding window": replace(_PLAIN, causal=True, window=256),
    "soft cap": replace(_PLAIN, soft_cap=30.0),
    "grouped heads (GQA, MQA)": replace(_PLAIN, kv_heads=2),
    "lengths 1 and odd": replace(_PLAIN, q_len=1, kv_len=1001),
}


def support_table() -> str:
    """Return a Markdown table: a row for each feature, a column for each implementation.

    Examples
    --------
    >>> print(support_table().splitlines()[0])
    | | xla | reference |
    """
    lines = [
        f"| | {' | '.join(IMPLEMENTATIONS)} |",
        f"|---|{'---|' * len(IMPLEMENTATIONS)}",
    ]
    for feature, call in _FEATURES.items():
        answers = (reason or "yes" for reason in implementations_for(call).values())
        lines.append(f"| {feature} | {' | '.join(answers)} |")
    return "\n".join(lines)
