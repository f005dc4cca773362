"""Observation of backend selections: which backend runs an attention call, and why."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from tjx_kernels.attention.call import AttentionCall


class Choice(NamedTuple):
    """Backend selected for an attention call, with the reasons against the others.

    Attributes
    ----------
    name
        A key of `backends()`.
    by_name
        Whether the caller requested it by name.
    reasons
        For each backend, in order of preference, the reason why it does not support the call, or
        None.
    call
        The call on one device of the mesh.
    """

    name: str
    by_name: bool
    reasons: Mapping[str, str | None]
    call: AttentionCall


current_observer: ContextVar[Callable[[Choice], None] | None] = ContextVar(
    "current_observer", default=None
)
"""Function that `api.select_backend` calls with each selection; set by `observe_choices`."""


@contextmanager
def observe_choices(observer: Callable[[Choice], None]) -> Iterator[None]:
    """Call `observer` with each backend selection made in the block, while JAX traces.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from tjx_kernels import flash_attention
    >>> x = jnp.ones((1, 8, 4, 16))
    >>> names = []
    >>> with observe_choices(lambda choice: names.append(choice.name)):
    ...     out = flash_attention(x, x, x, implementation="reference")
    >>> names
    ['reference']
    """
    token = current_observer.set(observer)
    try:
        yield
    finally:
        current_observer.reset(token)
