"""Models that other packages add. Standard library only: configurations are read without JAX."""

from collections.abc import Callable
from typing import Any

# Model of each configuration class; `tjx_nn.register` adds to it.
registered_models: dict[type, Callable[..., Any]] = {}


def registered_families() -> dict[str, type]:
    """Return the registered configuration classes that have a field `family`, by its default."""
    found = {getattr(kind, "family", None): kind for kind in registered_models}
    return {name: kind for name, kind in found.items() if isinstance(name, str)}
