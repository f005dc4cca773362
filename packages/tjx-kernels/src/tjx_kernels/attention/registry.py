"""Which implementation of attention was chosen for a call, for programs that report it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from tjx_kernels.attention.types import AttentionCall


class UnsupportedCallError(ValueError):
    """An implementation requested by name does not support the call."""


class Choice(NamedTuple):
    """The implementation that runs a call of attention.

    Attributes
    ----------
    name
        A key of `attention.IMPLEMENTATIONS`.
    by_name
        Whether the caller requested it by name.
    reasons
        For each implementation, in order of preference, why it does not support the call, or None.
    call
        The call, on one device of a mesh.
    """

    name: str
    by_name: bool
    reasons: dict[str, str | None]
    call: AttentionCall


_observer: ContextVar[Callable[[Choice], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observe_choices(observer: Callable[[Choice], None]) -> Iterator[None]:
    """Call `observer` with each choice that is made in the block, while JAX traces.

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
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def notify(choice: Choice) -> None:
    """Tell the observer, if there is one."""
    if observer := _observer.get():
        observer(choice)
