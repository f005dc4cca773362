"""Make a differentiable function of a forward and a backward pass.

What every kernel needs and none should repeat: the derivative with respect to the log-sum-exp,
rows that see no key, and the names for rematerialisation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tjx_kernels.attention.types import AttentionCall, Backward, BackwardInputs, Forward, Operands


def backward_inputs(
    call: AttentionCall, out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array
) -> BackwardInputs:
    """Prepare the backward pass of rows with the results `out` and `lse`.

    The derivative of the log-sum-exp with respect to the scores are the weights, so that its
    cotangent joins what the softmax subtracts (Dao et al., "FlashAttention", 2022, appendix B.2).
    """
    # A dead row depends on nothing: whatever arrives for it, NaN too, is not passed on.
    dead_BNT = lse == -jnp.inf
    dout = jnp.where(dead_BNT.swapaxes(1, 2)[..., None], 0, dout)
    dlse = jnp.where(dead_BNT, 0, dlse).astype(call.accumulator)
    product = jnp.einsum(
        "BTNH,BTNH->BNT",
        out,
        dout,
        precision=jax.lax.Precision.HIGHEST,  # float32 means float32, on GPU and TPU too
        preferred_element_type=call.accumulator,
    )
    return BackwardInputs(dout, jnp.where(dead_BNT, 0, lse), product - dlse)


def with_custom_vjp(forward: Forward, backward: Backward) -> Forward:
    """Bind two passes to one function with a derivative in reverse mode.

    The function raises `TypeError` where it is differentiated in forward mode. Within a `jax.jit`
    that is inside of it JAX finds out only when it compiles, and says less.
    """

    def attend(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
        return forward(call, operands)

    def attend_forward(call: AttentionCall, operands: Operands) -> Any:
        out, lse = forward(call, operands)
        # Both names, so that a remat policy that keeps them need not run the forward pass again.
        # (checkpoint_name has no types in jax.)
        out = checkpoint_name(out, "flash_attention_out")  # type: ignore[no-untyped-call]
        lse = checkpoint_name(lse, "flash_attention_lse")  # type: ignore[no-untyped-call]
        return (out, lse), (operands, out, lse)

    def attend_backward(call: AttentionCall, residuals: Any, cotangents: Any) -> tuple[Operands]:
        operands, out, lse = residuals
        found = backward(call, operands, backward_inputs(call, out, lse, *cotangents))
        nothing = Operands(*(None for _ in operands))  # type: ignore[arg-type]  # no gradient
        return (nothing._replace(q=found.q, k=found.k, v=found.v, bias=found.bias),)

    attention = jax.custom_vjp(attend, nondiff_argnums=(0,))
    attention.defvjp(attend_forward, attend_backward)
    # Compiled also where the caller is not: else every operation would be dispatched by itself.
    compiled = jax.jit(attention, static_argnums=0, inline=True)

    def run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
        try:
            result: tuple[jax.Array, jax.Array] = compiled(call, operands)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "this attention differentiates in reverse mode alone (jax.grad, jax.vjp); for "
                'forward mode (jax.jvp, jax.jacfwd) give implementation="reference"'
            ) from error
        return result

    return run
