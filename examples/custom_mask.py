"""Attend with a mask of your own: a prefix that every token sees, and causal attention after it.

Run: `./pants run examples/custom_mask.py`, or `python examples/custom_mask.py` with tjx-kernels
installed. It prints the largest difference to dense attention, and the keys that the second query
depends on.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tjx_kernels import flash_attention

PREFIX = 3


def prefix_mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Return whether a query attends to a key; the arguments are integer arrays of indices."""
    del batch, head  # the same for all rows and heads
    return (key < PREFIX) | (key <= query)


keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (2, 8, 4, 16)) for key in keys)  # [batch, tokens, heads, dim]
out = jax.jit(lambda q, k, v: flash_attention(q, k, v, mask=prefix_mask))(q, k, v)

# The same mask as an array [1, 1, q_len, kv_len], in dense attention.
tokens = jnp.arange(8)
mask = prefix_mask(0, 0, tokens[:, None], tokens[None, :])[None, None]
dense = flash_attention(q, k, v, mask=mask, implementation="reference")
difference = jnp.abs(out - dense).max()

# Which keys a query sees, by differentiation: query 1 depends on the whole prefix, also on key 2.
gradient = jax.grad(lambda v: flash_attention(q, k, v, mask=prefix_mask)[0, 1].sum())(v)
seen = jnp.nonzero(jnp.abs(gradient[0]).sum((1, 2)))[0].tolist()

print(f"largest difference {float(difference):.1e}")
print(f"query 1 sees keys  {seen}")
