"""Time the GPT-2 head loss, forward and backward, over chunk sizes.

python -m gpu_slices.head_loss --tokens 32768
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_slices.json_lines import begin, finish

from tjx_kernels import linear_cross_entropy

ITERATIONS = 10


def measure(
    chunk_size: int | None, x: jax.Array, w: jax.Array, labels: jax.Array
) -> dict[str, Any]:
    """Compile and time both passes with one chunk size; return milliseconds and bytes."""

    @jax.jit
    def both(x: jax.Array, w: jax.Array, labels: jax.Array) -> Any:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            return linear_cross_entropy(x, w, labels, chunk_size=chunk_size).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    compiled = both.lower(x, w, labels).compile()
    value, _ = jax.block_until_ready(compiled(x, w, labels))  # type: ignore[no-untyped-call]  # as jax is
    seconds = []
    for _ in range(ITERATIONS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, w, labels))  # type: ignore[no-untyped-call]  # as jax is
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "least_ms": round(1e3 * min(seconds), 3),
        "temp_bytes": memory.temp_size_in_bytes,
        "loss": float(value),
    }


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((given.tokens, given.width), np.float32), jnp.bfloat16)
    w = jnp.asarray(0.02 * rng.standard_normal((given.vocabulary, given.width), np.float32))
    labels = jnp.asarray(rng.integers(0, given.vocabulary, given.tokens), jnp.int32)
    sizes = [None, *(given.vocabulary // n for n in (24, 12, 6, 3, 1))]
    for size in sizes:
        case = f"head loss, {'default' if size is None else size} rows a chunk"
        begin(case)
        try:
            finish(case, "ok", **measure(size, x, w, labels))
        except Exception as error:  # such as out-of-memory
            finish(case, "failed", reason=f"{type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    main()
