"""Mosaic GPU backend: supported calls, and lazy import of the kernels."""

from functools import cache
from importlib import metadata

import jax

from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.batching import batched_backward, batched_forward
from tjx_kernels.attention.call import AttentionCall, Operands


def supports(call: AttentionCall) -> str | None:
    """Return the reason why the kernels do not support a call, or None."""
    reasons = {
        "needs an NVIDIA Hopper GPU (sm_90)": not call.interpret
        and (call.platform, call.architecture) != ("gpu", "sm_90"),
        "needs ptxas of CUDA 12.9.1 or later: 12.8.0 to 12.9.0 compile it wrongly": (
            not call.interpret and _ptxas_miscompiles()
        ),
        "needs bfloat16 or float16": (call.dtype not in ("bfloat16", "float16")),
        "needs a head_dim that is a multiple of 16, at most 256": (
            call.head_dim % 16 != 0 or call.head_dim > 256
        ),
        "needs a v_head_dim equal to head_dim": call.v_head_dim != call.head_dim,
        "has no ALiBi slopes": call.alibi,
        "has no bias": call.bias is not None,
        "has no dropout": call.dropout_rate > 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@cache
def _ptxas_miscompiles() -> bool:
    """Return whether JAX's CUDA plugin has a ptxas version that miscompiles the kernels.

    Only pip packages are checked; the version of another CUDA installation is unknown.
    """
    try:
        metadata.version("jax-cuda12-plugin")
        version = metadata.version("nvidia-cuda-nvcc-cu12")
    except metadata.PackageNotFoundError:
        return False
    # nvcc 12.8.61 belongs to CUDA 12.8.0, 12.9.41 to 12.9.0, 12.9.86 to 12.9.1.
    return (12, 8) <= tuple(int(part) for part in version.split(".")[:3]) < (12, 9, 86)


# Mosaic GPU is imported by the first call: its import takes longer than that of all other kernels,
# and most processes run none of its kernels.
def _forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from tjx_kernels.attention.backends.mosaic_gpu.forward import forward

    return forward(call, operands)


def _backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    from tjx_kernels.attention.backends.mosaic_gpu.backward import backward

    return backward(call, operands, rows)


_BACKWARD = batched_backward(_backward)
BACKEND = AttentionBackend(
    run=with_custom_vjp(batched_forward(_forward), _BACKWARD),
    supports=supports,
    backward=_BACKWARD,
    platforms=("gpu",),
)
