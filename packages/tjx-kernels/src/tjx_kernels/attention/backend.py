"""Interface of attention backends, and the derivative that all of them share.

`with_custom_vjp` makes a differentiable backend from a forward and a backward pass. It adds what
every kernel needs: the derivative with respect to the log-sum-exp, dead rows, and names for
rematerialization policies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.target import Platform


class BackwardInputs(NamedTuple):
    """Inputs of the backward pass for each query row, besides the operands.

    Attributes
    ----------
    dout
        [batch, q_len, heads, v_head_dim] in the call's dtype; 0 for dead rows.
    lse
        [batch, heads, q_len] in the accumulator's dtype, natural logarithm. 0 for dead rows: their
        scores are all -inf, so exp(score - lse) is 0 and not NaN.
    delta
        [batch, heads, q_len] in the accumulator's dtype: rowsum(out * dout) - dlse.
    """

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Gradients of q, k, v and the bias with their operands' shapes and dtypes.

    `bias` is None if the call has no bias.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


# Returns out [batch, q_len, heads, v_head_dim] in the call's dtype and the LSE [batch, heads,
# q_len] in the accumulator's dtype: 0 and -inf for rows that attend to no key.
type Forward = Callable[[AttentionCall, Operands], tuple[jax.Array, jax.Array]]


type Backward = Callable[[AttentionCall, Operands, BackwardInputs], Gradients]


def supports_every_call(call: AttentionCall) -> str | None:
    """Support every call, except a request to interpret a Pallas kernel."""
    return "it is not a Pallas kernel: leave out interpret" if call.interpret else None


class AttentionBackend(NamedTuple):
    """One implementation of attention; `register_backend` adds one to `flash_attention`.

    Attributes
    ----------
    run
        Differentiable function of the call and its operands that returns the output and the LSE.
        `with_custom_vjp` makes one from a forward and a backward pass.
    supports
        Returns None for a supported call, otherwise the reason, in words that complete
        "implementation X cannot serve this call: ...". It sees shapes and options only.
    backward
        Backward pass that takes the LSE and delta of whole rows and a part of the keys, as ring
        attention needs it; None if the backend has none.
    platforms
        Platforms on which automatic selection considers the backend ("cpu", "gpu", "tpu"); None
        for all. A call with `interpret=True` ignores it.
    masks
        Whether the backend applies `call.mask`.
    """

    run: Forward
    supports: Callable[[AttentionCall], str | None] = supports_every_call
    backward: Backward | None = None
    platforms: tuple[Platform, ...] | None = None
    masks: bool = False

    def refusal(self, call: AttentionCall) -> str | None:
        """Return the reason why the backend cannot serve a call, or None.

        Parameters
        ----------
        call
            Static part of the call.

        Returns
        -------
        str or None
            As of `supports`, which does not test for mask functions.
        """
        reason = self.supports(call)
        if reason is None and call.mask is not None and not self.masks:
            return "has no mask functions"
        return reason


def backward_inputs(
    call: AttentionCall, out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array
) -> BackwardInputs:
    """Compute delta and mask dead rows before the backward pass.

    The derivative of the log-sum-exp with respect to the scores is the softmax, so its cotangent
    joins the term that the softmax subtracts (Dao et al., "FlashAttention", 2022, appendix B.2).
    `dout` and `dlse` are the cotangents of the results `out` and `lse` of the forward pass.
    """
    # A dead row depends on no input: its cotangent, NaN included, must not reach the gradients.
    dead_BNT = lse == -jnp.inf
    dout = jnp.where(dead_BNT.swapaxes(1, 2)[..., None], 0, dout)
    dlse = jnp.where(dead_BNT, 0, dlse).astype(call.accumulator)
    product = jnp.einsum(
        "BTNH,BTNH->BNT",
        out,
        dout,
        precision=jax.lax.Precision.HIGHEST,  # no TF32 or bfloat16 passes for float32 inputs
        preferred_element_type=call.accumulator,
    )
    return BackwardInputs(dout, jnp.where(dead_BNT, 0, lse), product - dlse)


def with_custom_vjp(forward: Forward, backward: Backward) -> Forward:
    """Bind a forward and a backward pass to one function with a reverse-mode derivative.

    The function raises `TypeError` in forward mode. Inside a nested `jax.jit` JAX detects that only
    when it compiles, with a less specific message.

    Parameters
    ----------
    forward
        (call, operands) -> (out, lse).
    backward
        (call, operands, backward inputs) -> gradients.
    """

    def attend_forward(call: AttentionCall, operands: Operands) -> Any:
        out, lse = forward(call, operands)
        # A remat policy that saves both names skips the forward pass in the backward pass.
        # (checkpoint_name has no types in jax.)
        out = checkpoint_name(out, "flash_attention_out")  # type: ignore[no-untyped-call]
        lse = checkpoint_name(lse, "flash_attention_lse")  # type: ignore[no-untyped-call]
        return (out, lse), (operands, out, lse)

    def attend_backward(call: AttentionCall, residuals: Any, cotangents: Any) -> tuple[Operands]:
        operands, out, lse = residuals
        grads = backward(call, operands, backward_inputs(call, out, lse, *cotangents))
        no_grads = Operands(*(None for _ in operands))  # type: ignore[arg-type]
        return (no_grads._replace(q=grads.q, k=grads.k, v=grads.v, bias=grads.bias),)

    attention = jax.custom_vjp(forward, nondiff_argnums=(0,))
    attention.defvjp(attend_forward, attend_backward)
    # Compiled even if the caller is not: otherwise JAX dispatches every operation by itself.
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
