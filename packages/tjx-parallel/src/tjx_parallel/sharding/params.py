"""Shardings of parameters and of the train state."""

from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_parallel.sharding.rules import ShardingRules


def param_shardings(
    mesh: Mesh,
    rules: ShardingRules,
    logical_axes: Any,
    shapes: Any,
    *,
    without: Collection[str] = (),
) -> Any:
    """Return the sharding of each parameter from its logical axes.

    Use it as ``out_shardings`` of the jitted initialization: then no device holds an unsharded
    parameter, and the values do not depend on the mesh.

    Parameters
    ----------
    mesh
        The device mesh.
    rules
        Rules from logical to mesh axes.
    logical_axes
        A pytree like the parameters; a leaf is a tuple with one name (or None) per dimension, or
        None for a replicated parameter.
    shapes
        A pytree like the parameters whose leaves have ``.shape``: `jax.eval_shape` gives one.
    without
        Mesh axes to ignore: `STORAGE_AXES` for gathered parameters.

    Returns
    -------
    Any
        A pytree of NamedShardings like the parameters.

    Raises
    ------
    ValueError
        One line for each dimension that the mesh does not divide, each unknown logical axis and
        each parameter that only one of the trees has, with the parameter's path.

    Examples
    --------
    >>> from tjx_parallel import MeshConfig, make_mesh
    >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    >>> shapes = {"w": jax.ShapeDtypeStruct((4, 8), "float32")}
    >>> shardings = param_shardings(mesh, ShardingRules(), {"w": ("embed", "mlp")}, shapes)
    >>> tuple(shardings["w"].spec)
    (None, None)
    """
    axes = dict(jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=_is_axes))
    paths_and_shapes, structure = jax.tree_util.tree_flatten_with_path(shapes)
    shape_paths = {path for path, _ in paths_and_shapes}
    problems = [
        f"{_name(path)}: got logical axes; expected none, as there is no such parameter"
        for path in axes
        if path not in shape_paths
    ]
    specs: list[PartitionSpec] = []
    for path, leaf in paths_and_shapes:
        if path not in axes:
            problems.append(
                f"{_name(path)}: got no logical axes; expected a tuple, or None to replicate it"
            )
            continue
        names = (None,) * len(leaf.shape) if axes[path] is None else axes[path]
        try:
            specs.append(rules.spec(mesh, names, leaf.shape, name=_name(path), without=without))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])


def state_shardings(abstract_state: Any, params_shardings: Any) -> Any:
    """Return the sharding of each leaf of a train state.

    A leaf whose path ends with the path of a parameter (the parameter itself or an optimizer
    moment) gets its sharding; the longest match wins. All other leaves are replicated, as are
    leaves whose shape does not fit the parameter's sharding (factored moments, placeholders).

    Parameters
    ----------
    abstract_state
        Any pytree whose leaves have ``.shape``: `jax.eval_shape` gives one.
    params_shardings
        Result of `param_shardings`.

    Returns
    -------
    Any
        A pytree of NamedShardings like the state.

    Raises
    ------
    ValueError
        If `params_shardings` is empty.
    """
    by_path = {
        _parts(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)
    }
    if not by_path:
        raise ValueError(
            "params_shardings: got an empty tree; expected a sharding per parameter; pass the "
            "result of param_shardings"
        )
    whole = replicated(next(iter(by_path.values())).mesh)

    def inherit(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = _parts(path)
        for start in range(len(parts)):
            sharding = by_path.get(parts[start:])
            if sharding is not None:
                return sharding if _fits(sharding, leaf.shape) else whole
        return whole

    return jax.tree_util.tree_map_with_path(inherit, abstract_state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device.

    Parameters
    ----------
    mesh
        The device mesh.

    Returns
    -------
    NamedSharding
        The sharding.
    """
    spec = PartitionSpec()  # type: ignore[no-untyped-call]  # JAX gives no types
    return NamedSharding(mesh, spec)


def _is_axes(node: Any) -> bool:
    return node is None or isinstance(node, tuple)


def _parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return a path as strings, the same for dict keys, fields and indices."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(_parts(path))


def _fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    if len(sharding.spec) != len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
