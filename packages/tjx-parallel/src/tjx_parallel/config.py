"""The sizes of the device mesh."""

import math
from dataclasses import asdict, dataclass

AXES = ("stage", "data", "fsdp", "context", "expert", "tensor")
"""The axes of every mesh, outer to inner: neighbours in the last one talk most."""

_NOT_YET = ("stage", "context", "expert")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices work together in which way; the product is the number of devices.

    Attributes
    ----------
    stage
        Devices among which the layers are divided (pipeline); only 1 in this version.
    data
        Devices that hold the same parameters and different sequences; -1 takes all that are left.
    fsdp
        Devices that divide parameters, optimizer state and sequences; -1 takes all that are left.
    context
        Devices that divide each sequence; only 1 in this version.
    expert
        Devices that divide the experts; only 1 in this version.
    tensor
        Devices that divide heads and widths of each layer; -1 takes all that are left.

    Examples
    --------
    >>> MeshConfig(fsdp=4).axis_sizes(8)["data"]
    2
    """

    stage: int = 1
    data: int = -1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = asdict(self)
        problems = [
            f"{axis} = {size}: must be 1 or more, or -1 for all devices that are left"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        problems += [
            f"{axis} = {sizes[axis]}: this version of tjx-parallel only knows {axis} = 1; "
            "use data, fsdp or tensor"
            for axis in _NOT_YET
            if sizes[axis] > 1 or sizes[axis] == -1
        ]
        filling = [axis for axis, size in sizes.items() if size == -1]
        if len(filling) > 1:
            problems.append(
                f"{' and '.join(filling)} are -1: one axis at most can take all devices that are "
                "left; set the others to 1 or more"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def axis_sizes(self, device_count: int) -> dict[str, int]:
        """Return the size of each axis on ``device_count`` devices, -1 filled in.

        Raises
        ------
        ValueError
            If the sizes do not make up that number of devices.
        """
        sizes = asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
        filling = [axis for axis, size in sizes.items() if size == -1]
        if filling:
            if device_count % fixed:
                raise ValueError(
                    f"mesh {text} needs a multiple of {fixed} devices, there are {device_count}: "
                    "choose sizes whose product divides it"
                )
            sizes[filling[0]] = device_count // fixed
        elif fixed != device_count:
            raise ValueError(
                f"mesh {text or 'of 1 device'} needs {fixed} devices, there are {device_count}: "
                "set one axis to -1 to use all, or pass the devices to use"
            )
        return sizes
