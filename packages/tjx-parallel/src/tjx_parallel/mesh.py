"""Device meshes from axis sizes: `make_mesh`."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tjx_parallel.config import AXES, MeshConfig

# Axes that may cross slow links, those with the least communication first.
_OVER_SLOW_LINKS = ("data", "stage", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a device mesh with the axes `AXES`.

    Inner axes get the fast links: JAX knows the topology of a TPU slice, and GPUs of one node are
    consecutive. TPU slices are joined along data, stage or fsdp. All axes are in Auto mode: the
    compiler propagates the shardings of parameters and batch.

    Parameters
    ----------
    config
        Size of each axis.
    devices
        Devices of the mesh; None is every device of every process.

    Returns
    -------
    jax.sharding.Mesh
        The mesh.

    Raises
    ------
    ValueError
        If the product of the sizes is not the number of devices, or the slices do not divide data x
        stage x fsdp.

    Examples
    --------
    >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    >>> mesh.axis_names
    ('stage', 'data', 'fsdp', 'context', 'expert', 'tensor')
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = config.axis_sizes(len(chosen))
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen)
    outer = across_slices(sizes, slices)
    inner = tuple(size // over for size, over in zip(shape, outer, strict=True))
    ordered = mesh_utils.create_hybrid_device_mesh(inner, outer, chosen)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def across_slices(sizes: dict[str, int], slices: int) -> tuple[int, ...]:
    """Return the number of TPU slices that each axis spans; raises as `make_mesh`."""
    left, outer = slices, dict.fromkeys(AXES, 1)
    for axis in _OVER_SLOW_LINKS:
        outer[axis] = math.gcd(left, sizes[axis])
        left //= outer[axis]
    if left > 1:
        text = " x ".join(f"{axis}={sizes[axis]}" for axis in _OVER_SLOW_LINKS)
        raise ValueError(
            f"devices: got {slices} slices with the mesh {text}; expected a divisor of the "
            "product, as only these axes cross slices; choose other sizes"
        )
    return tuple(outer[axis] for axis in AXES)
