"""A logit depends on the tokens up to its own position, on all of them, and on nothing else."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tjx_nn import GPTConfig, bind
from tjx_nn.functional import Params

Run = Callable[..., np.ndarray]


def test_influence_is_lower_triangular(tiny: GPTConfig, params: Params) -> None:
    """Differentiate each position's output by each position's input embedding."""

    @jax.jit
    def influence(params: Params, offsets: jax.Array) -> jax.Array:
        def hidden(offsets: jax.Array) -> jax.Array:
            # A position table of its own for each position makes its input a variable.
            wpe = params["wpe"]["embedding"] + offsets
            model = bind(tiny, {**params, "wpe": {"embedding": wpe}})
            return model.hidden(jnp.arange(tiny.max_seq_len)[None, :])[0]

        return jnp.abs(jax.jacrev(hidden)(offsets)).sum((1, 3))

    zeros = jax.device_put(np.zeros((tiny.max_seq_len, tiny.d_model), np.float32))
    grid = np.asarray(influence(params, zeros))
    assert np.all(np.triu(grid, 1) == 0)
    assert np.all(grid[np.tril_indices(tiny.max_seq_len)] > 0)


def test_rows_of_a_batch_do_not_see_each_other(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    together = run(tiny, params, tokens)
    alone = run(tiny, params, jax.device_get(tokens)[1:])
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)
