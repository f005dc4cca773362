"""Parameter paths such as ``blocks/attention/query/bias``, their roles, and settings by path.

A role is read from the path and, for names that frameworks use for more than one role, from the
number of axes. It is not read from the number of axes alone: layers stacked for ``lax.scan`` have
2-D biases [layers, features] and 3-D kernels.

Settings are looked up by path and not by tree, since an optimizer of some of the parameters (those
that are not frozen, muon's matrices) sees a tree with holes, and since the settings can be a dict
where the parameters are an ``nnx.State``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_groups import NO_GROUP, ParameterGroup


class ParameterRules:
    """Learning-rate factor, weight decay, group, stack axes and muon mask of each parameter.

    `param_checks.check_params` checks that they fit the parameters.

    Parameters
    ----------
    config : OptimizerConfig
        Weight decay, its exceptions, and the groups.
    trees : mapping of str to pytree
        `learning_rate_scales`, `stack_axes` and the other trees of `make_optimizer`, by name; None
        for its default.
    """

    def __init__(self, config: OptimizerConfig, trees: Mapping[str, Any]) -> None:
        self.groups = config.parameter_groups
        self._weight_decay = float(config.settings["weight_decay"])
        self._decay_embeddings = config.decay_embeddings
        self.cautious_decay = config.cautious_decay
        self.given = {
            name: leaves_by_path(tree) for name, tree in trees.items() if tree is not None
        }

    @property
    def freezes(self) -> bool:
        """Whether any group is frozen."""
        return any(group.frozen for group in self.groups)

    def group(self, path: str) -> ParameterGroup:
        """Return the group of a parameter."""
        for group in self.groups:
            if group.matches(path):
                return group
        return NO_GROUP

    def weight_decay(self, path: str, axes: int) -> float:
        """Return the weight decay of a parameter of so many axes, per unit of learning rate."""
        scale = float(self.given.get("weight_decay_scales", {}).get(path, 1.0))
        of_group = self.group(path).weight_decay
        if of_group is not None:
            return scale * of_group
        if "decay_mask" in self.given:
            decayed = bool(self.given["decay_mask"][path])
        else:
            own_axes = axes - self.stack_axes(path)
            decayed = decays(path, own_axes, decay_embeddings=self._decay_embeddings)
        return scale * self._weight_decay if decayed else 0.0

    def learning_rate_scale(self, path: str) -> Any:
        """Return the factor of a parameter's learning rate."""
        scale = self.group(path).learning_rate_scale
        scales = self.given.get("learning_rate_scales")
        return scale if scales is None else scale * scales[path]

    @property
    def scales_learning_rates(self) -> bool:
        """Whether the learning rate of any parameter has a factor."""
        return "learning_rate_scales" in self.given or any(
            group.learning_rate_scale != 1 for group in self.groups
        )

    def stack_axes(self, path: str) -> int:
        """Return how many leading axes of a parameter stack layers and experts."""
        stacked = self.given.get("stack_axes")
        return 0 if stacked is None else int(stacked[path])

    def is_muon_matrix(self, path: str, axes: int) -> bool:
        """Return whether muon, dion and soap treat a parameter of so many axes as a matrix."""
        if "muon_mask" in self.given:
            return bool(self.given["muon_mask"][path])
        return is_hidden_matrix(path, axes - self.stack_axes(path))


# Names of leaves in flax NNX and Linen, Haiku (w, b, offset, embeddings) and Equinox (weight).
BIASES = ("bias", "offset")
NORM_SCALES = ("scale",)
EMBEDDINGS = ("embedding", "embeddings", "cls")
KERNELS = ("kernel",)
# These name kernels, embedding tables and norm scales alike.
WEIGHTS = ("w", "weight")
HAIKU_BIAS = "b"
# Names of modules.
HEADS = ("head",)
EMBEDDING_MODULES = ("embed", "embedding", "embeddings", "wte", "wpe")


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map a function of (path, leaf, ...) over a tree and others with the same structure.

    Examples
    --------
    >>> map_with_path(lambda path, a, b: f"{path} {a + b}", {"x": 1}, {"x": 2})
    {'x': 'x 3'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_text(path), *leaves), tree, *rest
    )


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return a dict from path to leaf, in the order of the tree.

    Examples
    --------
    >>> leaves_by_path({"norm": {"scale": 1.0}})
    {'norm/scale': 1.0}
    """
    return {_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decays(path: str, axes: int, *, decay_embeddings: bool) -> bool:
    """Return whether weight decay applies to a parameter; see `decay_mask`.

    Parameters
    ----------
    path : str
        Path of the parameter.
    axes : int
        Number of its axes, without axes that stack layers.
    decay_embeddings : bool
        Whether decay applies to embedding tables.

    Examples
    --------
    >>> decays("norm/weight", 1, decay_embeddings=True)
    False
    """
    if is_kind(path, *BIASES, *NORM_SCALES) or _name(path) == HAIKU_BIAS:
        return False
    if _name(path) in WEIGHTS and axes < 2:
        return False
    return decay_embeddings or not _is_embedding(path)


def is_kind(path: str, *kinds: str) -> bool:
    """Return whether the last part of a path is one of some names, or ends in ``_`` and one.

    Examples
    --------
    >>> is_kind("mlp/bias", "bias"), is_kind("qkv_bias", "bias"), is_kind("unbias", "bias")
    (True, True, False)
    >>> is_kind("blocks/scale_1", "scale")
    True
    """
    name = _name(path)
    return any(name == kind or name.endswith(f"_{kind}") for kind in kinds)


def is_hidden_matrix(path: str, axes: int) -> bool:
    """Return whether a parameter is the weight matrix of a hidden layer.

    A ``kernel`` or ``*_kernel``, or a ``weight`` or ``w`` of two axes or more that is no embedding
    table; in neither case of an output layer (``head``, ``*_head``).

    Parameters
    ----------
    path : str
        Path of the parameter.
    axes : int
        Number of its axes, without axes that stack layers.

    Examples
    --------
    >>> is_hidden_matrix("blocks/mlp/up/kernel", 2), is_hidden_matrix("head/kernel", 2)
    (True, False)
    >>> is_hidden_matrix("linear/w", 2), is_hidden_matrix("norm/weight", 1)
    (True, False)
    """
    if is_kind(_module(path), *HEADS):
        return False
    return is_kind(path, *KERNELS) or (
        _name(path) in WEIGHTS and axes >= 2 and not _is_embedding(path)
    )


def _is_embedding(path: str) -> bool:
    return is_kind(path, *EMBEDDINGS) or (
        _name(path) in WEIGHTS and is_kind(_module(path), *EMBEDDING_MODULES)
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2].rstrip("0123456789").removesuffix("_")


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _text(path: Any) -> str:
    # The array of an nnx.Variable is its attribute `value`; in nnx.to_pure_dict it is the leaf.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def add_weight_decay(rules: ParameterRules) -> optax.GradientTransformation:
    """Add each parameter's decay; cautious: where the update shrinks it (Chen et al. 2025)."""

    def add(path: str, update: Any, param: Any) -> Any:
        rate = rules.weight_decay(path, param.ndim)
        decayed = param * (update * param >= 0) if rules.cautious_decay else param
        return update + rate * decayed if rate else update

    return update_by_path(add)


def update_by_path(function: Callable[[str, Any, Any], Any]) -> optax.GradientTransformation:
    """Map a function of (path, update, parameter) over the updates."""
    return optax.stateless(lambda updates, params: map_with_path(function, updates, params))
