"""Cases of the attention benchmark: shapes, FLOPs, reference results and errors.

Imports neither JAX nor torch: the parent and both workers import it, the torch worker possibly with
an older Python.

Axes: B batch, N heads, T query rows, S keys, D head_dim.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Suite = Literal["cpu", "gpu"]
Pass = Literal["forward", "backward", "both"]
Array = npt.NDArray[np.float64]

PASSES: tuple[Pass, ...] = ("forward", "backward", "both")

# Skip dense attention if a float32 matrix of all scores exceeds this; it holds several of them.
DENSE_LIMIT = {"cpu": 4 * 2**30, "gpu": 8 * 2**30}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape: self-attention of `length` rows.

    Attributes
    ----------
    group
        Cases of a group differ only in `length` and share a column of the figure.
    """

    group: str
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool

    @property
    def name(self) -> str:
        """One-line description of the shape."""
        mask = "causal" if self.causal else "full"
        return (
            f"B {self.batch}, T {self.length}, {self.heads} heads of {self.head_dim}, "
            f"{self.dtype}, {mask}"
        )

    @property
    def scores_bytes(self) -> int:
        """Bytes of all scores in float32."""
        return 4 * self.batch * self.heads * self.length**2

    def flops(self, which: Pass) -> float:
        """FLOPs of a pass: forward 4 B N T S D, half of it when causal; backward 2.5x."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]
        return forward * factor * (0.5 if self.causal else 1.0)

    def small(self) -> "Case":
        """Return a smaller case, for which float64 attention is cheap."""
        return replace(self, batch=2, length=min(self.length, 256), heads=2)


def cases(suite: Suite, *, quick: bool = False) -> list[Case]:
    """List the cases of a suite."""
    if suite == "cpu":
        lengths = ((2, 64), (1, 128)) if quick else ((16, 512), (1, 8192))
        return [
            Case(
                group=("causal" if causal else "full") + ", 8 heads of 64",
                batch=batch,
                length=length,
                heads=8,
                head_dim=64,
                dtype="float32",
                causal=causal,
            )
            for causal in (True, False)
            for batch, length in lengths
        ]
    tokens, width = 2**14, 2048
    found = [
        Case(
            group=f"causal, {tokens} tokens, {width // head_dim} heads of {head_dim}",
            batch=tokens // length,
            length=length,
            heads=width // head_dim,
            head_dim=head_dim,
            dtype="bfloat16",
            causal=True,
        )
        for head_dim in (128, 64)
        for length in ((1024,) if quick else (1024, 2048, 4096, 8192, 16384))
    ]
    return [*found, gpt2_medium()]


def gpt2_medium() -> Case:
    """Return the attention case of GPT-2 medium at T 2048 and batch 16."""
    return Case(
        group="GPT-2 medium, 16 heads of 64",
        batch=16,
        length=2048,
        heads=16,
        head_dim=64,
        dtype="bfloat16",
        causal=True,
    )


def small_inputs(case: Case) -> tuple[npt.NDArray[np.float32], ...]:
    """Draw q, k, v and the output gradient, [B, T, N, D], equal in every process."""
    shape = (case.batch, case.length, case.heads, case.head_dim)
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for _ in range(4))


def oracle(case: Case, q: Array, k: Array, v: Array, dout: Array) -> tuple[Array, ...]:
    """Compute output and gradients of q, k, v in float64, [B, T, N, D]."""
    q, k, v, dout = (x.swapaxes(1, 2) for x in (q, k, v, dout))  # [B, N, T, D]
    scores = q @ k.swapaxes(2, 3) * case.head_dim**-0.5
    if case.causal:
        scores = np.where(np.tri(case.length, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * case.head_dim**-0.5
    dk, dv = ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
    return tuple(x.swapaxes(1, 2) for x in (p @ v, ds @ k, dk, dv))


def errors(found: tuple[Array, ...], right: tuple[Array, ...]) -> dict[str, float]:
    """Return the relative L2 error and the largest error of output and gradients."""
    named = list(zip(("out", "dq", "dk", "dv"), found, right, strict=True))
    relative = {
        f"{name}_relative": float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in named
    }
    return relative | {f"{name}_largest": float(np.abs(a - b).max()) for name, a, b in named}


def iterations(seconds_each: float, seconds: float) -> int:
    """Return the number of calls that take about `seconds`, from 1 to 20."""
    return max(1, min(20, math.ceil(seconds / max(seconds_each, 1e-9))))
