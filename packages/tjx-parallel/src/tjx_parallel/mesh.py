"""From sizes to a mesh of real devices."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from tjx_parallel.config import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh with the axes `AXES`.

    JAX orders the devices so that inner axes get the fast links. The axes are in Auto mode: the
    compiler carries the shardings of parameters and batch through the model.

    Parameters
    ----------
    config
        The size of each axis.
    devices
        The devices to use, all of them; None takes every device of every process.

    Raises
    ------
    ValueError
        If the sizes do not make up the number of devices; names both.

    Examples
    --------
    >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    >>> mesh.axis_names
    ('stage', 'data', 'fsdp', 'context', 'expert', 'tensor')
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = config.axis_sizes(len(chosen))
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=chosen,
    )
