"""Compare one attention implementation with float64, forward and backward, and run it twice.

    python -m gpu_slices.attention_check --implementation triton --cases smoke

One process checks one implementation, so that a CUDA fault of one does not affect the others.
"""

import argparse
import time
from typing import Any

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import Case
from gpu_slices.json_lines import begin, finish

from tjx_kernels import chosen_implementation, flash_attention

# Relative L2 error: a few units in the last place of the dtype, as probabilities and their
# gradients are rounded to it before the products.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}  # float32 is TF32 on a GPU
# Largest error over the largest value: detects a few wrong rows, which the norm would hide.
LARGEST = {"bfloat16": 3e-2, "float16": 6e-3, "float32": 6e-3}
# The summation order of gradients is nondeterministic without XLA's deterministic flag.
NOT_DETERMINISTIC = {"cudnn"}


def cases(suite: str, *, tiny: bool) -> list[Case]:
    """List the cases of a suite; self-attention, B 2, 2 heads."""
    lengths, head_dims = ((49,), (16,)) if tiny else ((1024, 1001), (64, 128))
    shapes = [(length, head_dim, "bfloat16", True) for length in lengths for head_dim in head_dims]
    if suite == "rest":
        odd = lengths[-1]
        shapes = [(odd, head_dim, "bfloat16", False) for head_dim in head_dims]
        if not tiny:
            shapes += [(odd, head_dim, "float16", True) for head_dim in head_dims]
            shapes += [(odd, head_dim, "bfloat16", True) for head_dim in (80, 96, 256)]
            shapes += [(2048, head_dim, "bfloat16", True) for head_dim in head_dims]
    return [
        Case(
            group="", batch=2, length=length, heads=2, head_dim=head_dim, dtype=dtype, causal=causal
        )
        for length, head_dim, dtype, causal in shapes
    ]


def check(case: Case, implementation: str, *, interpret: bool) -> dict[str, Any]:
    """Run both passes of a case twice.

    Parameters
    ----------
    case : Case
        Shape and dtype.
    implementation : str
        A key of `tjx_kernels.backends()`.
    interpret : bool
        Whether a Pallas kernel runs in the interpreter.

    Returns
    -------
    dict
        "reason": description of the failure, or None; "same_bits": whether both runs agree;
        "worst": the largest relative error; "errors": all of them; "compile_seconds".
    """
    drawn = [jnp.asarray(x, jnp.dtype(case.dtype)) for x in attention_cases.small_inputs(case)]

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return flash_attention(
                q, k, v, causal=case.causal, implementation=implementation, interpret=interpret
            )

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    start = time.perf_counter()
    compiled = both.lower(*drawn).compile()
    seconds = time.perf_counter() - start
    found, again = (tuple(map(np.asarray, compiled(*drawn))) for _ in range(2))
    same_bits = all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    right = attention_cases.oracle(case, *(np.asarray(x, np.float64) for x in drawn))
    errors = attention_cases.errors(tuple(x.astype(np.float64) for x in found), right)
    problems = [] if same_bits or implementation in NOT_DETERMINISTIC else ["two runs differ"]
    for name, wanted in zip(("out", "dq", "dk", "dv"), right, strict=True):
        relative = errors[f"{name}_relative"]
        largest = errors[f"{name}_largest"] / float(np.abs(wanted).max())
        # Written so that NaN fails.
        if not (relative <= TOLERANCE[case.dtype] and largest <= LARGEST[case.dtype]):
            problems.append(f"{name}: relative error {relative:.2g}, largest {largest:.2g}")
    return {
        "reason": "; ".join(problems) or None,
        "same_bits": same_bits,
        "worst": max(errors[f"{name}_relative"] for name in ("out", "dq", "dk", "dv")),
        "errors": errors,
        "compile_seconds": round(seconds, 2),
    }


def refusal(case: Case, implementation: str, *, interpret: bool) -> str | None:
    """Return why the implementation does not support a case on this device, or None."""
    shape = (case.batch, case.length, case.heads, case.head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))  # type: ignore[no-untyped-call]  # as jax is
    try:
        chosen_implementation(
            x, x, x, causal=case.causal, implementation=implementation, interpret=interpret
        )
    except ValueError as error:
        _, _, reason = str(error).partition("cannot serve this call: ")
        return reason.partition(";")[0] or str(error)
    return None


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--cases", choices=("smoke", "rest"), default="smoke")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    given = parser.parse_args()
    # "xla" has no interpret mode.
    interpret = jax.default_backend() == "cpu" and given.implementation != "xla"
    for case in cases(given.cases, tiny=given.tiny):
        begin(case.name)
        if reason := refusal(case, given.implementation, interpret=interpret):
            finish(case.name, "skipped", reason=reason)
            continue
        try:
            found = check(case, given.implementation, interpret=interpret)
        except Exception as error:  # compilers and drivers raise many types
            lines = str(error).splitlines() or [""]
            finish(case.name, "failed", reason=f"{type(error).__name__}: {lines[0][:300]}")
            continue
        finish(case.name, "failed" if found["reason"] else "ok", **found)


if __name__ == "__main__":
    main()
