"""Registry of attention backends and the selection of one for a call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

from tjx_kernels.attention.backends import cudnn, mosaic_gpu, reference, tpu, triton, xla
from tjx_kernels.attention.types import AttentionBackend, AttentionCall

# In order of preference: automatic selection takes the first backend that supports the call.
# "cudnn" is first on NVIDIA GPUs: it is NVIDIA's own and the fastest one published. "triton"
# supports every call that "mosaic_gpu" does and precedes it until that kernel has been measured on
# a GPU. "xla" supports every call and precedes "reference", so dense attention is never a default.
_BUILT_IN: Mapping[str, AttentionBackend] = MappingProxyType(
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

    def replace(self, entries: Mapping[str, AttentionBackend]) -> None:
        self.entries = MappingProxyType(dict(entries))


_registry = _Registry(_BUILT_IN)
_observer: ContextVar[Callable[[Choice], None] | None] = ContextVar("observer", default=None)


def backends() -> Mapping[str, AttentionBackend]:
    """Return the registered backends by name, in order of preference (read-only)."""
    return _registry.entries


def register_backend(name: str, backend: AttentionBackend, *, before: str | None = None) -> None:
    """Add an attention backend to `flash_attention` and all functions built on it.

    Parameters
    ----------
    name
        Value of `implementation` that selects the backend.
    backend
        The functions that compute attention and state which calls they support.
    before
        Name of the backend that the new one precedes in automatic selection. None appends it:
        then it runs only if requested by name, as "xla" before it supports every call.

    Raises
    ------
    ValueError
        If the name is empty or registered already, or `before` is not registered.

    Examples
    --------
    >>> from tjx_kernels import flash_attention
    >>> from tjx_kernels.attention.backends import xla
    >>> import jax.numpy as jnp
    >>> register_backend("double", xla.BACKEND._replace(
    ...     run=lambda call, x: xla.BACKEND.run(call, x._replace(v=2 * x.v))))
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> print(flash_attention(x, x, x, implementation="double")[0, 0, 0])
    [2. 2. 2. 2.]
    >>> unregister_backend("double")
    """
    entries = list(backends().items())
    names = [key for key, _ in entries]
    if not name or name in names:
        raise ValueError(
            f"name: got {name!r}; expected a new name, not one of {', '.join(names)}; choose "
            "another, or call unregister_backend first"
        )
    if before is not None and before not in names:
        raise ValueError(
            f"before: got {before!r}; expected one of {', '.join(names)}, or None; correct the name"
        )
    entries.insert(len(names) if before is None else names.index(before), (name, backend))
    _registry.replace(dict(entries))


def unregister_backend(name: str) -> None:
    """Remove a backend that `register_backend` added.

    Raises
    ------
    ValueError
        If the name is not registered, or belongs to a built-in backend.
    """
    if name in _BUILT_IN or name not in backends():
        added = ", ".join(key for key in backends() if key not in _BUILT_IN) or "none yet"
        raise ValueError(
            f"name: got {name!r}; expected a backend added by register_backend ({added}); correct "
            "the name"
        )
    _registry.replace({key: entry for key, entry in backends().items() if key != name})


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


def implementations_for(call: AttentionCall) -> dict[str, str | None]:
    """Return for each backend why it does not support a call, or None where it does."""
    return {name: entry.supports(call) for name, entry in backends().items()}


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
