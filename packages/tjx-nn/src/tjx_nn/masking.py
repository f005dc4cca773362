"""Masked language modelling: which tokens BERT hides, and what it is to say in their place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from tjx_nn.tokens import IGNORED, Ids


def mask_tokens(
    tokens: Ids,
    key: Array,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Choose tokens to predict, and hide most of them.

    Of the chosen, 80 % become the mask, 10 % a random token, and 10 % stay what they are, so that
    the model has to look at every token. Devlin et al. 2018, "BERT", section 3.1.

    Parameters
    ----------
    tokens
        Token ids.
    key
        A key made by `jax.random.key`; the same key hides the same tokens.
    mask_id
        The token that hides others.
    vocab_size
        Random tokens are from 0 to vocab_size - 1, and none of the special ones.
    special_ids
        Tokens that are never chosen: padding, start, separator.
    rate
        Probability that a token is chosen.

    Returns
    -------
    tuple
        What the model reads, and labels: the token where it was chosen, -100 elsewhere.

    Raises
    ------
    ValueError
        Naming everything that is wrong with the arguments, one a line.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> tokens = jnp.full((1, 8), 7)
    >>> inputs, labels = mask_tokens(
    ...     tokens, jax.random.key(0), mask_id=3, vocab_size=9, special_ids=[0, 1], rate=1.0
    ... )
    >>> set(labels.ravel().tolist())
    {7}
    """
    hidden = np.unique([*special_ids, mask_id])
    _check(hidden, vocab_size, rate)
    tokens = jnp.asarray(tokens, jnp.int32)
    which, how, what = jax.random.split(key, 3)
    special = (tokens[..., None] == jnp.asarray(hidden, jnp.int32)[None, None]).any(-1)
    chosen = jax.random.bernoulli(which, rate, tokens.shape) & ~special
    how_BT = jax.random.uniform(how, tokens.shape)
    # The i-th ordinary token: i, moved up by the special ones that are not above it.
    other = jax.random.randint(what, tokens.shape, 0, vocab_size - len(hidden), jnp.int32)
    for special_id in hidden:
        other = other + (other >= special_id)
    inputs = jnp.where(how_BT < 0.8, mask_id, jnp.where(how_BT < 0.9, other, tokens))
    return jnp.where(chosen, inputs, tokens), jnp.where(chosen, tokens, IGNORED)


def _check(hidden: np.ndarray, vocab_size: int, rate: float) -> None:
    problems = []
    if hidden.min() < 0 or hidden.max() >= vocab_size:
        problems.append(
            f"mask_id and special_ids are from {hidden.min()} to {hidden.max()} and vocab_size is "
            f"{vocab_size}: give ids from 0 to {vocab_size - 1}"
        )
    elif len(hidden) >= vocab_size:
        problems.append(f"vocab_size is {vocab_size}: mask and special tokens leave no other")
    if not 0 <= rate <= 1:
        problems.append(f"rate is {rate}: give a probability from 0 to 1")
    if problems:
        raise ValueError("\n".join(problems))
