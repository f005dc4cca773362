"""Settings of single parameters, looked up by path.

The lookup is by path and not by tree, since an optimizer of some of the parameters (those that are
not frozen, muon's matrices) sees a tree with holes, and since the settings can be a dict where the
parameters are an ``nnx.State``.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tjx_core import ConfigError, Problem
from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_groups import ParameterGroup, group_of, unused_groups
from tjx_optim.param_paths import decays, is_hidden_matrix, leaves_by_path, path_strings


class ParameterRules:
    """Learning-rate factor, weight decay, group, stack axes and muon mask of each parameter.

    Parameters
    ----------
    config : OptimizerConfig
        Weight decay, its exceptions, and the groups.
    learning_rate_scales, stack_axes, decay_mask, muon_mask : pytree, optional
        As for `make_optimizer`.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        learning_rate_scales: Any = None,
        stack_axes: Any = None,
        decay_mask: Any = None,
        muon_mask: Any = None,
    ) -> None:
        self._groups = config.parameter_groups
        self._weight_decay = float(config.settings["weight_decay"])
        self._decay_embeddings = config.decay_embeddings
        trees = {
            "learning_rate_scales": learning_rate_scales,
            "stack_axes": stack_axes,
            "decay_mask": decay_mask,
            "muon_mask": muon_mask,
        }
        self._given = {
            name: leaves_by_path(tree) for name, tree in trees.items() if tree is not None
        }

    @property
    def freezes(self) -> bool:
        """Whether any group is frozen."""
        return any(group.frozen for group in self._groups)

    def group(self, path: str) -> ParameterGroup:
        """Return the group of a parameter."""
        return group_of(path, self._groups)

    def weight_decay(self, path: str, axes: int) -> float:
        """Return the weight decay of a parameter of so many axes, per unit of learning rate."""
        of_group = self.group(path).weight_decay
        if of_group is not None:
            return of_group
        if "decay_mask" in self._given:
            decayed = bool(self._given["decay_mask"][path])
        else:
            own_axes = axes - self.stack_axes(path)
            decayed = decays(path, own_axes, decay_embeddings=self._decay_embeddings)
        return self._weight_decay if decayed else 0.0

    def learning_rate_scale(self, path: str) -> Any:
        """Return the factor of a parameter's learning rate."""
        scale = self.group(path).learning_rate_scale
        scales = self._given.get("learning_rate_scales")
        return scale if scales is None else scale * scales[path]

    @property
    def scales_learning_rates(self) -> bool:
        """Whether the learning rate of any parameter has a factor."""
        return "learning_rate_scales" in self._given or any(
            group.learning_rate_scale != 1 for group in self._groups
        )

    def stack_axes(self, path: str) -> int:
        """Return how many leading axes of a parameter stack layers and experts."""
        stacked = self._given.get("stack_axes")
        return 0 if stacked is None else int(stacked[path])

    def is_muon_matrix(self, path: str, axes: int) -> bool:
        """Return whether muon orthogonalizes the update of a parameter of so many axes."""
        if "muon_mask" in self._given:
            return bool(self._given["muon_mask"][path])
        return is_hidden_matrix(path, axes - self.stack_axes(path))

    def check(self, params: Any) -> None:
        """Check that the parameters and the trees given to the constructor fit together.

        Raises
        ------
        ConfigError
            If a parameter is narrower than float32, two have the same path, a tree does not have
            the paths of the parameters, there are more stack axes than axes, or a group is unused.
        """
        leaves = leaves_by_path(params)
        problems = [*_duplicate_paths(params), *_narrow(leaves)]
        for name, given in self._given.items():
            if given.keys() != leaves.keys():
                odd = sorted(given.keys() ^ leaves.keys())
                problems.append(
                    Problem(
                        name,
                        f"got {len(odd)} paths that differ from those of the parameters, such as "
                        f"{odd[0]}; expected a leaf for each parameter; build it from the "
                        "parameters that are trained",
                    )
                )
        if not problems:
            problems = [
                Problem(
                    "stack_axes",
                    f"got {self.stack_axes(path)} for {path} of shape {tuple(leaf.shape)}; "
                    "expected the number of its leading axes that stack layers and experts",
                )
                for path, leaf in leaves.items()
                if not 0 <= self.stack_axes(path) <= leaf.ndim
            ]
        problems += unused_groups(list(leaves), self._groups)
        if problems:
            raise ConfigError(problems)


def _duplicate_paths(params: Any) -> list[Problem]:
    counts = Counter(jax.tree.leaves(path_strings(params)))
    return [
        Problem("params", f"got {count} parameters with the path {path}; expected one; rename them")
        for path, count in counts.items()
        if count > 1
    ]


def _narrow(leaves: Mapping[str, Any]) -> list[Problem]:
    narrow = [
        f"{path} ({leaf.dtype})"
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    ]
    if not narrow:
        return []
    return [
        Problem(
            "params",
            f"got {len(narrow)} narrower than float32, such as {narrow[0]}; expected float32; keep "
            "parameters in float32 and cast them inside the model",
        )
    ]
