"""Selection of an attention backend for a call; `registration` adds backends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

from tjx_kernels.attention.backend import AttentionBackend
from tjx_kernels.attention.backends import cudnn, mosaic_gpu, reference, tpu, triton, xla
from tjx_kernels.attention.call import AttentionCall

# In order of preference: automatic selection takes the first backend that supports the call.
# "cudnn" is first on NVIDIA GPUs: it is NVIDIA's own and the fastest one published. "triton"
# supports every call that "mosaic_gpu" does and precedes it until that kernel has been measured on
# a GPU. "xla" supports every call and precedes "reference", so dense attention is never a default.
BUILT_IN: Mapping[str, AttentionBackend] = MappingProxyType(
    {
        "cudnn": cudnn.BACKEND,
        "triton": triton.BACKEND,
        "mosaic_gpu": mosaic_gpu.BACKEND,
        "tpu": tpu.BACKEND,
        "xla": xla.BACKEND,
        "reference": reference.BACKEND,
    }
)


class UnsupportedCallError(ValueError):
    """The backend that the caller requested by name does not support the call."""


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


class _Registry:
    """Ordered backends; a change replaces the mapping, so a reader sees it whole."""

    def __init__(self, entries: Mapping[str, AttentionBackend]) -> None:
        self.entries = entries


_registry = _Registry(BUILT_IN)
_observer: ContextVar[Callable[[Choice], None] | None] = ContextVar("observer", default=None)


def backends() -> Mapping[str, AttentionBackend]:
    """Return the registered backends by name, in order of preference (read-only)."""
    return _registry.entries


def set_backends(entries: Mapping[str, AttentionBackend]) -> None:
    """Replace the registered backends, in order of preference."""
    _registry.entries = MappingProxyType(dict(entries))


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
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def select_backend(
    name: str | None,
    call: AttentionCall,
    supports: Callable[[AttentionBackend], str | None] | None = None,
) -> AttentionBackend:
    """Return the backend that `choose_backend` names, and notify `observe_choices` of it."""
    chosen = choose_backend(name, call, supports)
    if observer := _observer.get():
        reason = supports or (lambda entry: entry.supports(call))
        reasons = {key: reason(entry) for key, entry in backends().items()}
        observer(Choice(chosen, name is not None, reasons, call))
    return backends()[chosen]


def choose_backend(
    name: str | None,
    call: AttentionCall,
    supports: Callable[[AttentionBackend], str | None] | None = None,
) -> str:
    """Return the name of the backend that runs a call.

    Parameters
    ----------
    name
        Backend requested by the caller; None selects the first that supports the call.
    call
        The call on one device.
    supports
        Support test of a backend; None is the backend's own test of `call`. Ring attention tests
        all calls of its schedule.

    Raises
    ------
    ValueError
        If no backend has the name, or none supports the call.
    UnsupportedCallError
        If the requested backend does not support the call.
    """
    entries = backends()
    reason = supports or (lambda entry: entry.supports(call))
    if name is None:
        for key, entry in entries.items():
            on_platform = entry.platforms is None or call.platform in entry.platforms
            if (on_platform or call.interpret) and reason(entry) is None:
                return key
        # Reached only with interpret: "xla" supports every other call.
        reasons = "; ".join(f"{key}: {reason(entry)}" for key, entry in entries.items())
        raise ValueError(
            f"interpret: got True; expected a call that a Pallas kernel supports ({reasons}); "
            "leave out interpret"
        )
    if name not in entries:
        raise ValueError(
            f"implementation: got {name!r}; expected one of {', '.join(entries)}, or None for "
            "automatic selection; correct the name, or add it with register_backend"
        )
    if (refusal := reason(entries[name])) is not None:
        raise UnsupportedCallError(
            f"implementation {name!r} cannot serve this call: {refusal}; "
            "change that, or give implementation=None to choose automatically"
        )
    return name
