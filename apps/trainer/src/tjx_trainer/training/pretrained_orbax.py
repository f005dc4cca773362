"""Initialization from the parameters of an Orbax checkpoint, in the layout of tjx models."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import tjx_ckpt
from tjx_ckpt.pytree import nested_dicts
from tjx_core import ConfigError, Problem
from tjx_nn.binding import check_params
from tjx_trainer.config.run_config import ModelConfig

# Where the parameters can be in a checkpoint: in MaxText's and Linen's train states, in those of
# other programs, or alone as `tjx-ckpt export --only params` writes them.
_PREFIXES = ("params/params/", "params/", "")


def check_orbax(path: str, model: ModelConfig) -> None:
    """Raise if an Orbax checkpoint lacks the parameters of a model. Reads no arrays.

    Parameters
    ----------
    path : str
        As for `tjx_ckpt.orbax_specs`.
    model : ModelConfig
        The model.

    Raises
    ------
    ConfigError
        Naming each parameter that is missing, unexpected or has another shape; or why the
        checkpoint cannot be read.
    """
    try:
        specs = tjx_ckpt.orbax_specs(path)
    except ValueError as error:
        raise ConfigError([Problem("train.init_from", str(error))]) from error
    keys = _param_keys(specs)
    params = {
        name: jax.ShapeDtypeStruct(specs[key].shape, specs[key].dtype)  # type: ignore[no-untyped-call]
        for name, key in keys.items()
    }
    try:
        check_params(model, nested_dicts(params))
    except ValueError as error:
        message = f"got orbax:{path}; expected the parameters of the model: {error}"
        raise ConfigError([Problem("train.init_from", message)]) from error


def orbax_params(path: str) -> dict[str, Any]:
    """Return the parameters in an Orbax checkpoint as nested dicts of float32 arrays on the host.

    Only the parameters are read, not the optimizer state. Raises as `check_orbax`.
    """
    keys = _param_keys(tjx_ckpt.orbax_specs(path))
    arrays = tjx_ckpt.read_orbax(path, list(keys.values()))
    return nested_dicts({name: arrays[key].astype(np.float32) for name, key in keys.items()})


def _param_keys(specs: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of each parameter by its name, below the first prefix that exists."""
    prefix = next(each for each in _PREFIXES if any(key.startswith(each) for key in specs or [""]))
    return {key.removeprefix(prefix): key for key in specs if key.startswith(prefix)}
