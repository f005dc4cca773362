"""What holds for each parameter, looked up by its path.

By the path and not by a tree, since an optimizer that is given only some of the parameters (those
that are not frozen, muon's matrices) sees a tree with holes.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_groups import ParameterGroup, group_of, unused_groups
from tjx_optim.param_paths import decays, leaves_by_path


class ParameterRules:
    """The rules of an optimizer, for any parameter that its path names.

    Parameters
    ----------
    config : OptimizerConfig
        Weight decay, what is exempt from it, and the groups.
    learning_rate_scales : pytree of floats like the parameters, optional
        A factor of the learning rate for each parameter; None: 1 for all.
    stack_axes : pytree of ints like the parameters, optional
        How many leading axes of each stack layers (and experts) on each other; None: 0 for all.
    """

    def __init__(
        self, config: OptimizerConfig, learning_rate_scales: Any = None, stack_axes: Any = None
    ) -> None:
        self._groups = config.parameter_groups
        self._weight_decay = float(config.settings["weight_decay"])
        self._decay_embeddings = config.decay_embeddings
        self._scales = (
            None if learning_rate_scales is None else leaves_by_path(learning_rate_scales)
        )
        self._stacked = None if stack_axes is None else leaves_by_path(stack_axes)

    @property
    def freezes(self) -> bool:
        """Whether any group is frozen."""
        return any(group.frozen for group in self._groups)

    def group(self, path: str) -> ParameterGroup:
        """Return the group that decides about a parameter."""
        return group_of(path, self._groups)

    def weight_decay(self, path: str) -> float:
        """Return a parameter's rate of decay, per unit of learning rate."""
        of_group = self.group(path).weight_decay
        if of_group is not None:
            return of_group
        return self._weight_decay if decays(path, decay_embeddings=self._decay_embeddings) else 0.0

    def learning_rate_scale(self, path: str) -> Any:
        """Return the factor of a parameter's learning rate."""
        scale = self.group(path).learning_rate_scale
        return scale if self._scales is None else scale * self._scales[path]

    @property
    def scales_learning_rates(self) -> bool:
        """Whether any parameter may learn at a rate of its own."""
        return self._scales is not None or any(g.learning_rate_scale != 1 for g in self._groups)

    def stack_axes(self, path: str) -> int:
        """Return how many leading axes of a parameter stack layers and experts."""
        return 0 if self._stacked is None else int(self._stacked[path])

    def check(self, params: Any) -> None:
        """Refuse parameters that the rules do not fit.

        Raises
        ------
        ValueError
            When a parameter is narrower than float32; when a tree of the rules is not like the
            parameters, or stacks more axes than there are; when a group decides about nothing.
        """
        leaves = leaves_by_path(params)
        problems = _narrow(leaves)
        for name, tree in (("learning_rate_scales", self._scales), ("stack_axes", self._stacked)):
            if tree is not None and tree.keys() != leaves.keys():
                odd = sorted(tree.keys() ^ leaves.keys())
                problems.append(
                    f"{name}: must have a leaf for each parameter and no other; {len(odd)} differ, "
                    f"the first is {odd[0]}: make it of the parameters that are trained"
                )
        if not problems:
            problems = [
                f"stack_axes: {path} has {self.stack_axes(path)} for the shape {tuple(leaf.shape)}"
                ": must be the number of its leading axes of layers and experts"
                for path, leaf in leaves.items()
                if not 0 <= self.stack_axes(path) <= leaf.ndim
            ]
        problems += unused_groups(list(leaves), self._groups)
        if problems:
            raise ValueError("\n".join(problems))


def _narrow(leaves: Mapping[str, Any]) -> list[str]:
    narrow = [
        f"{path} ({leaf.dtype})"
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    ]
    if not narrow:
        return []
    return [
        f"{len(narrow)} parameters are narrower than float32, the first is {narrow[0]}: "
        "keep parameters in float32 and cast them inside the model to compute in less"
    ]
