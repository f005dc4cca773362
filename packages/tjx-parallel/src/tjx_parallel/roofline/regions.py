"""Model region and pass of a kernel, from JAX's op_name metadata.

An op_name is a path of functions, transformations, scopes (`jax.named_scope`) and a primitive, as
``jit(train_step)/transpose(jvp(mlp))/dot_general``.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tjx_parallel.planning.hlo import Instruction

SCOPES = {
    "embedding": "embedding",
    "norm": "normalization",
    "attention_layer": "attention projections",
    "attention": "attention",
    "mlp": "MLP",
    "residual": "residual stream",
    "loss": "head loss",
    "gradients": "gradient sums",
    "optimizer": "optimizer",
}
"""Region by scope name; the innermost scope of a path wins."""

LOOP = "layer loop"
COLLECTIVES = "collectives"
OTHER = "other"
PASSES = ("forward", "backward", "update")

_TRANSFORMED = re.compile(r"^(?:(?:jvp|transpose|vmap|remat|checkpoint)\()+([^()]*)\)+$")
# Slicing and stacking by `jax.lax.scan`.
_LOOP_SLICES = re.compile(r"while/body/(?:jit\()?dynamic_(?:update_)?(?:index_in_dim|slice)")


class Region(NamedTuple):
    """Model region and pass of a kernel.

    Attributes
    ----------
    name
        A value of `SCOPES`; "layer loop" for the slicing and stacking of a scan, "other" without a
        known scope.
    phase
        "forward", "backward" (including recomputation), or "update" for operations that are
        not differentiated.
    """

    name: str
    phase: str


def region_of(op_name: str) -> Region:
    """Return the region and the pass of an op_name.

    Examples
    --------
    >>> region_of("jit(train_step)/transpose(jvp(mlp))/dot_general")
    Region(name='MLP', phase='backward')
    >>> region_of("jit(train_step)/jvp()/while/body/jit(dynamic_index_in_dim)/dynamic_slice")
    Region(name='layer loop', phase='forward')
    """
    phase = "update"
    if "transpose(" in op_name:
        phase = "backward"
    elif "jvp(" in op_name:
        phase = "forward"
    for part in reversed(op_name.split("/")):
        transformed = _TRANSFORMED.match(part)
        scope = transformed[1] if transformed else part
        if scope in SCOPES:
            return Region(SCOPES[scope], phase)
    return Region(LOOP if _LOOP_SLICES.search(op_name) else OTHER, phase)


def op_name_of(kernel: Instruction, fused: Iterable[Instruction]) -> str:
    """Return the op_name that determines the region of a kernel.

    In order of precedence: the matrix product in a fusion, the kernel itself if it has a scope, the
    scope with the most elements in the fusion, the kernel itself, the loop whose operands it
    prepares.

    Parameters
    ----------
    kernel
        The instruction.
    fused
        The instructions of its fusion, if it is one.
    """
    fused = list(fused)
    products = [each.op_name for each in fused if each.op in ("dot", "convolution")]
    for name in (*products, kernel.op_name):
        if region_of(name).name not in (LOOP, OTHER):
            return name
    weights: dict[Region, int] = {}
    names: dict[Region, str] = {}
    for each in fused:
        region = region_of(each.op_name)
        if region.name not in (LOOP, OTHER):
            weights[region] = weights.get(region, 0) + sum(x.size for x in each.results())
            names[region] = each.op_name
    if weights:
        return names[max(weights, key=lambda region: weights[region])]
    if own := kernel.op_name:
        return own
    loops = [each for each in _consumers(kernel) if each.op == "while"]
    if loops and loops[0].op_name:
        return f"{loops[0].op_name}/body/dynamic_slice"
    return next((each.op_name for each in fused if each.op_name), "")


def _consumers(source: Instruction) -> list[Instruction]:
    """Return the users of a result, looking through tuples, copies and bitcasts."""
    found = []
    for user in source.users:
        passes_on = user.op in ("tuple", "copy", "bitcast", "get-tuple-element")
        found += _consumers(user) if passes_on else [user]
    return found
