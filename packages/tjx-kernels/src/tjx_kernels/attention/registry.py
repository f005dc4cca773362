"""Registry of attention backends, in order of preference."""

from collections.abc import Mapping
from types import MappingProxyType

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


class _Registry:
    """Ordered backends; a change replaces the mapping, so a reader sees it whole."""

    entries: Mapping[str, AttentionBackend] = BUILT_IN


REGISTRY = _Registry()


def backends() -> Mapping[str, AttentionBackend]:
    """Return the registered backends by name, in order of preference (read-only)."""
    return REGISTRY.entries


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
    REGISTRY.entries = MappingProxyType(dict(entries))


def unregister_backend(name: str) -> None:
    """Remove a backend that `register_backend` added.

    Parameters
    ----------
    name
        Name of the backend.

    Raises
    ------
    ValueError
        If the name is not registered, or belongs to a built-in backend.
    """
    if name in BUILT_IN or name not in backends():
        added = ", ".join(key for key in backends() if key not in BUILT_IN) or "none yet"
        raise ValueError(
            f"name: got {name!r}; expected a backend added by register_backend ({added}); correct "
            "the name"
        )
    REGISTRY.entries = MappingProxyType(
        {key: entry for key, entry in backends().items() if key != name}
    )


def implementations_for(call: AttentionCall) -> dict[str, str | None]:
    """Return for each backend why it does not support a call, or None where it does.

    Parameters
    ----------
    call
        Static part of a call: shapes, dtype, masks and target device.

    Returns
    -------
    dict
        Reason, or None, by name of the backend, in the order of selection.
    """
    return {name: entry.refusal(call) for name, entry in backends().items()}
