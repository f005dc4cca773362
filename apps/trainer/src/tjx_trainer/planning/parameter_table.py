"""``trainer parameters``: table of parameters with shapes, axes, sharding and bytes."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tjx_core import ConfigError, problems_of
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.planning.plan_command import ParameterFlags, command_help, device_count, read_flags
from tjx_trainer.runtime.exit_codes import ExitCode

_HELP = """\
usage: trainer parameters [--chips N] [--config NAME_OR_PATH] [--section.name VALUE] ...

Prints every parameter: shape, logical axes, mesh axes that shard it, bytes per device.

"""


class ParameterRow(NamedTuple):
    """A row of the parameter table.

    Attributes
    ----------
    name : str
        Path of the parameter.
    shape : tuple of int
        Global shape.
    logical_axes : tuple of (str or None)
        Logical axis of each dimension.
    mesh_axes : tuple of tuple of str
        Mesh axes that shard each dimension.
    bytes : int
        Bytes per device.
    """

    name: str
    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    mesh_axes: tuple[tuple[str, ...], ...]
    bytes: int


def run(argv: Sequence[str]) -> int:
    """Print the table; `argv` are the arguments after ``parameters``. Mistakes exit with code 2."""
    if {"--help", "-h"} & set(argv):
        sys.stdout.write(_HELP + command_help(ParameterFlags))
        return ExitCode.FINISHED
    try:
        flags, config = read_flags(argv, ParameterFlags)
        count = device_count(flags.chips, config)
        # These import JAX.
        from tjx_trainer.planning.compiled_step import cpu_devices, with_vocabulary
        from tjx_trainer.training.build import build_step_components
        from tjx_trainer.training.train_state import bytes_on_device, trained_axes

        config, notes = with_vocabulary(config)
        try:
            parts = build_step_components(config, cpu_devices(count))
        except ValueError as error:
            raise ConfigError(problems_of(error)) from error
    except ConfigError as error:
        exit_with_errors(error)
    import tjx_nn

    state = parts.abstract
    found = list(rows(trained_axes(config), state.params))
    if state.base is not None:
        found += rows(tjx_nn.logical_axes(config.model), state.base)
    lines = [*text(found), "", *notes]
    lines += [
        f"{sum(math.prod(row.shape) for row in found):,} parameters on {count} devices; bytes per "
        f"device: {bytes_on_device((state.params, state.base)):,} of parameters, "
        f"{bytes_on_device(state.opt_state):,} of optimizer state"
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return ExitCode.FINISHED


def rows(logical_axes: Any, params: Any) -> Iterator[ParameterRow]:
    """Yield a row per parameter of an abstract tree with these logical axes."""
    import jax

    from tjx_trainer.training.train_state import bytes_on_device

    axes = dict(jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=_is_axes))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        yield ParameterRow(
            "/".join(jax.tree_util.keystr((key,), simple=True) for key in path),
            leaf.shape,
            axes[path] or (None,) * leaf.ndim,
            tuple((one,) if isinstance(one, str) else tuple(one or ()) for one in spec),
            bytes_on_device(leaf),
        )


def text(found: Sequence[ParameterRow]) -> list[str]:
    """Format the table as lines."""
    cells = [("parameter", "shape", "logical axes", "mesh axes", "bytes/device")]
    for row in found:
        cells.append((
            row.name,
            " x ".join(map(str, row.shape)) or "scalar",
            ", ".join(name or "-" for name in row.logical_axes),
            ", ".join("+".join(names) or "-" for names in row.mesh_axes),
            f"{row.bytes:,}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number == 4 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _is_axes(node: Any) -> bool:
    return node is None or isinstance(node, tuple)
