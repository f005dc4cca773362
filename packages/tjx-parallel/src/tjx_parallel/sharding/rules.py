"""Sharding rules: the table from logical array axes to mesh axes.

A model names each dimension of its parameters and activations and is independent of meshes. A new
kind of parallelism changes a rule, not the model.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from jax.sharding import Mesh, PartitionSpec

from tjx_core import did_you_mean
from tjx_parallel.config import AXES, MeshConfig

DEFAULT_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": ("data", "fsdp", "expert"),  # sequences
        "seq": ("context",),  # tokens, within a layer
        "residual": ("context", "tensor"),  # tokens of the residual stream between layers
        "layers": ("stage",),  # the stacked blocks
        "vocab": ("tensor",),
        "position": (),  # rows of a position or token-type embedding
        "embed": ("fsdp",),  # width of the residual stream
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "mlp": ("tensor",),
        "expert": ("expert",),  # experts of a block
        "latent": (),  # compressed keys and values of latent attention
        "indexer": (),  # the indexer of sparse attention
        "patch": (),  # values of an image patch
        "classes": (),
    }
)
"""Logical axis -> mesh axes that shard it."""

STORAGE_AXES = ("data", "fsdp")
"""Mesh axes that shard weights only for storage: matrix products gather them."""


class ShardingRules:
    """Rules from logical axes to mesh axes.

    Parameters
    ----------
    rows
        Rules that replace or extend `DEFAULT_RULES`: logical axis -> mesh axes that shard it (none
        replicates it).

    Raises
    ------
    ValueError
        If a rule names an unknown mesh axis.

    Examples
    --------
    >>> rules = ShardingRules({"vocab": (), "mlp": ("fsdp", "tensor")})
    >>> rules.mesh_axes("vocab"), rules.mesh_axes("mlp"), rules.mesh_axes("embed")
    ((), ('fsdp', 'tensor'), ('fsdp',))
    """

    def __init__(self, rows: Mapping[str, Sequence[str]] | None = None) -> None:
        problems = [
            f"rows: got {name} -> {tuple(axes)} with {axis!r}; expected mesh axes, of "
            f"{', '.join(AXES)}"
            for name, axes in (rows or {}).items()
            for axis in ([axes] if isinstance(axes, str) else axes)
            if isinstance(axes, str) or axis not in AXES
        ]
        if problems:
            raise ValueError("\n".join(problems))
        given = {name: tuple(axes) for name, axes in (rows or {}).items()}
        self._rows = {**DEFAULT_RULES, **given}

    @classmethod
    def of(cls, config: MeshConfig) -> "ShardingRules":
        """Return the rules of a mesh config: its rows and its sequence parallelism.

        Parameters
        ----------
        config
            `rules` and `sequence_parallel` are used.

        Returns
        -------
        ShardingRules
            The rules.
        """
        residual = {} if config.sequence_parallel else {"residual": DEFAULT_RULES["seq"]}
        return cls({**residual, **config.rows()})

    def mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Return the mesh axes that shard a logical axis.

        Parameters
        ----------
        logical_axis
            Name of the axis, such as "embed".

        Returns
        -------
        tuple of str
            Mesh axes, outer to inner; empty for an axis that is never sharded.

        Raises
        ------
        ValueError
            If there is no rule for it.
        """
        if logical_axis not in self._rows:
            raise ValueError(
                f"logical_axis: got {logical_axis!r}; expected an axis with a rule; add one, such "
                f"as ShardingRules({{{logical_axis!r}: ()}})"
                f"{did_you_mean(logical_axis, self._rows)}"
            )
        return self._rows[logical_axis]

    def spec(
        self,
        mesh: Mesh,
        logical_axes: Sequence[str | None],
        shape: Sequence[int],
        *,
        name: str = "parameter",
        without: Collection[str] = (),
    ) -> PartitionSpec:
        """Return the partition spec of an array of ``shape`` on ``mesh``.

        Mesh axes of size 1 are omitted. A mesh axis shards only the first dimension whose rule has
        it.

        Parameters
        ----------
        mesh
            The device mesh.
        logical_axes
            A name per dimension; None for one that is never sharded.
        shape
            Global shape of the array.
        name
            Name of the array in messages.
        without
            Mesh axes to ignore: `STORAGE_AXES` for a gathered weight.

        Returns
        -------
        PartitionSpec
            Mesh axes by dimension.

        Raises
        ------
        ValueError
            If a name has no rule, the number of names is not that of the dimensions, or the mesh
            does not divide a dimension; one line each.
        """
        if len(logical_axes) != len(shape):
            raise ValueError(
                f"{name}: got {len(logical_axes)} logical axes {tuple(logical_axes)}; expected one "
                f"for each dimension of {tuple(shape)}"
            )
        used: set[str] = set()
        entries: list[tuple[str, ...] | None] = []
        problems: list[str] = []
        for number, (logical, size) in enumerate(zip(logical_axes, shape, strict=True)):
            try:
                wanted = () if logical is None else self.mesh_axes(logical)
            except ValueError as error:
                problems.append(f"{name}: {error}")
                continue
            axes = tuple(axis for axis in wanted if mesh.shape[axis] > 1 and axis not in used)
            used.update(axes)
            axes = tuple(axis for axis in axes if axis not in without)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                problems.append(
                    f"{name}: got size {size} of dimension {number} ({logical}); expected a "
                    f"multiple of {' x '.join(axes)} = {parts}; change one of them, or replicate "
                    f"this axis with the rule {logical} -> ()"
                )
            entries.append(axes or None)
        if problems:
            raise ValueError("\n".join(problems))
        return PartitionSpec(*entries)  # type: ignore[no-untyped-call]  # JAX gives no types
