"""Bounds on the gradient: of one entry, of a unit beside its weights, of everything together."""

import optax

from tjx_optim.optimizer_config import OptimizerConfig
from tjx_optim.param_rules import ParameterRules
from tjx_optim.per_layer import per_layer


def clipping_stages(
    config: OptimizerConfig, rules: ParameterRules
) -> list[optax.GradientTransformation]:
    """Return the bounds that are asked for, in the order in which they are applied.

    The finest comes first, so that the global norm is that of what the moments see.

    - ``clip_value``: each entry to [-clip_value, clip_value].
    - ``clip_adaptive``: the gradient's norm over a unit's incoming weights (a column of a kernel
      [in, out], the whole of a bias) to ``clip_adaptive * max(norm of those weights, 1e-3)``.
      Brock et al. 2021, section 4.1, equation 3.
    - ``clip_norm``: the norm over all entries of all parameters. Pascanu et al. 2013, algorithm 1.
    """
    stages = []
    if config.clip_value is not None:
        stages.append(optax.clip(config.clip_value))
    if config.clip_adaptive is not None:
        # By the rank, optax takes a stack of biases for a matrix and one of kernels for heads.
        stages.append(per_layer(optax.adaptive_grad_clip(config.clip_adaptive), rules.stack_axes))
    if config.clip_norm is not None:
        stages.append(optax.clip_by_global_norm(config.clip_norm))
    return stages
