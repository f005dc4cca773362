"""Mixture of experts: many MLPs, of which each token goes to a few.

Tokens are sorted by expert, so that each expert multiplies a dense matrix; nothing of the size
tokens x experts x capacity exists. Rows move by gathers alone, backward too: sums of gradients have
one order.

Axes in names: B batch, T time, D d_model, F hidden layer, E experts, K choices of a token, G groups
of tokens that share a capacity, R rows that experts work on.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.attention.mha import AuxLosses
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.linear import initial_std
from tjx_nn.layers.matmul import ParamSharding, expert_matmul
from tjx_nn.layers.mlp import ACTIVATIONS, make_mlp
from tjx_nn.layout import ShardedModule


class ExpertKernel(ShardedModule):
    """A float32 kernel by itself: of each expert a matrix."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float, rngs: nnx.Rngs
    ) -> None:
        values = normal(std)(rngs.params(), shape, jnp.float32)
        self.axes = axes
        self.kernel = nnx.Param(values, logical_axes=axes)

    def batched(self, x: Float[Array, "E G C I"]) -> Float[Array, "E G C O"]:
        """Multiply each expert's rows with its matrix."""
        y: Array = expert_matmul(ParamSharding(self.layout, self.axes), x, self.kernel[...])
        return y

    def ragged(self, x: Float[Array, "R I"], filled: Int[Array, " E"]) -> Float[Array, "R O"]:
        """Multiply rows that are sorted by expert, so many of each as `filled` says."""
        w = self.table(self.kernel, self.axes).astype(x.dtype)
        return jax.lax.ragged_dot(x, w, filled)


class Dispatch(NamedTuple):
    """Which row of the experts' work is which choice of a token; told in both directions.

    Choices are numbered in the order in which they are served: the first of all tokens, the second
    of all tokens, and so on.

    Attributes
    ----------
    choice
        In each row, those of expert 0 first; the number of choices where a row is empty.
    row
        Of each choice; the number of rows where the choice is dropped.
    filled
        Number of choices of each expert, dropped or not.
    """

    choice: Int[Array, " R"]
    row: Int[Array, "K T"]
    filled: Int[Array, " E"]


class Experts(ShardedModule):
    """Experts in place of an MLP: each token goes to the few that its router prefers.

    Each sequence is a group of its own: what is dropped does not depend on the others in the batch,
    and groups can lie on different devices. In a group first choices come before second ones, and
    earlier tokens before later ones.

    Shazeer et al. 2017, "Outrageously Large Neural Networks"; Lepikhin et al. 2020, "GShard";
    shared experts: Dai et al. 2024, "DeepSeekMoE".

    Parameters
    ----------
    config
        Sizes and choices.
    rngs
        Source of the initial values.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, f, count = config.d_model, config.expert_dim, config.experts.count
        std = initial_std(config, residual=False)
        down_std = initial_std(config, residual=True)
        up, down = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        self.router = ExpertKernel((d, count), ("embed", "expert"), std=std, rngs=rngs)
        self.up = ExpertKernel((count, d, f), up, std=std, rngs=rngs)
        self.gate = ExpertKernel((count, d, f), up, std=std, rngs=rngs) if config.gated else None
        self.down = ExpertKernel((count, f, d), down, std=down_std, rngs=rngs)
        shared = config.experts.shared
        self.shared = make_mlp(config, d_ff=shared * f, rngs=rngs) if shared else None

    def __call__(
        self, x: Float[Array, "B T D"], *, drop: bool = True
    ) -> tuple[Float[Array, "B T D"], AuxLosses]:
        """Return the weighted sum of what each token's experts make of it, and the measures.

        Parameters
        ----------
        x
            The normalised residual stream.
        drop
            Whether an expert takes no more than its capacity, `capacity_factor` times its equal
            share of a sequence's tokens, rounded up. The rest is dropped, and adds 0.

        Returns
        -------
        tuple
            The output, and "balance_loss" (1 where choices and probabilities are spread evenly;
            Fedus et al. 2021, "Switch Transformers", section 2.2), "router_z_loss" (mean square of
            the router's log-sum-exp; Zoph et al. 2022, "ST-MoE", section 3.2), "dropped" (the
            fraction of all choices whose expert was full).
        """
        experts = self.config.experts
        batch, tokens, d = x.shape
        # Each sequence is whole, and in its order: first come, first served.
        x = self.layout.place(self.layout.restore(x), ("batch", None, "embed"))
        if x.size == 0:
            zero = jnp.zeros((), jnp.float32)
            return x, {"balance_loss": zero, "router_z_loss": zero, "dropped": zero}
        factor = experts.capacity_factor if drop else None
        share = experts.per_token * tokens / experts.count
        # A token has each expert once: no capacity needs to be larger than the number of tokens.
        capacity = None if factor is None else min(math.ceil(factor * share), tokens)
        x_GTD = x.reshape(1, batch * tokens, d) if capacity is None else x
        weights_GTK, chosen_GTK, aux_losses = self._route(x_GTD)
        plan = jax.vmap(lambda chosen: _plan(chosen, experts.count, capacity))(chosen_GTK)
        rows_GRD = jax.vmap(_to_rows)(x_GTD, plan)
        y_GRD = self._ragged(rows_GRD, plan) if capacity is None else self._batched(rows_GRD)
        y_GKTD = jax.vmap(_from_rows)(y_GRD, plan)
        y_GTD = (jnp.moveaxis(weights_GTK, -1, 1)[..., None] * y_GKTD).sum(1).astype(x.dtype)
        y = y_GTD.reshape(x.shape)
        y = y if self.shared is None else y + self.shared(x)
        aux_losses["dropped"] = (plan.row == rows_GRD.shape[1]).astype(jnp.float32).mean()
        return self.layout.reorder(y), aux_losses

    def _route(
        self, x: Float[Array, "G T D"]
    ) -> tuple[Float32[Array, "G T K"], Int[Array, "G T K"], AuxLosses]:
        """Return the weights and numbers of each token's experts, best first, and the losses."""
        experts = self.config.experts
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.router.table(self.router.kernel, self.router.axes),
            precision=jax.lax.Precision.HIGHEST,
        )
        probabilities = jax.nn.softmax(logits, -1)
        # The gradient of the values of `top_k` would be a scatter: they are selected instead.
        chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), experts.per_token)[1]
        is_chosen_GTKE = chosen[..., None] == jnp.arange(experts.count)[None, None, None]
        weights = jnp.where(is_chosen_GTKE, probabilities[..., None, :], 0).sum(-1)
        if experts.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        asked = is_chosen_GTKE.sum((0, 1, 2)) / chosen.size
        balance = experts.count * (asked * probabilities.mean((0, 1))).sum()
        z_loss = jnp.square(jax.nn.logsumexp(logits, -1)).mean()
        return weights, chosen, {"balance_loss": balance, "router_z_loss": z_loss}

    def _ragged(self, rows: Float[Array, "1 R D"], plan: Dispatch) -> Float[Array, "1 R D"]:
        """Run the experts over rows without gaps, so many of each expert as chose it."""
        return self._feed(rows[0], lambda kernel, x: kernel.ragged(x, plan.filled[0]))[None]

    def _batched(self, rows: Float[Array, "G R D"]) -> Float[Array, "G R D"]:
        """Run the experts over rows of which each expert has as many as its capacity."""
        shape = (rows.shape[0], self.config.experts.count, -1, rows.shape[2])
        rows_GECD = self.layout.to_experts(rows.reshape(shape))
        y_EGCD = self._feed(jnp.moveaxis(rows_GECD, 1, 0), ExpertKernel.batched)
        return self.layout.from_experts(jnp.moveaxis(y_EGCD, 0, 1)).reshape(rows.shape)

    def _feed(
        self, x: Float[Array, "*rows D"], product: Callable[[ExpertKernel, Array], Array]
    ) -> Float[Array, "*rows D"]:
        activation = ACTIVATIONS[self.config.activation]
        hidden = product(self.up, x)
        if self.gate is None:
            return product(self.down, activation(hidden))
        return product(self.down, activation(product(self.gate, x)) * hidden)


def _plan(chosen: Int[Array, "T K"], count: int, capacity: int | None) -> Dispatch:
    """Give each choice of each token a row; first choices first, and earlier tokens first."""
    tokens = chosen.shape[0]
    expert = chosen.T.ravel()  # of each choice, in the order in which they are served
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)  # of each choice among those sorted by expert
    filled = (expert[:, None] == jnp.arange(count)[None]).sum(0, dtype=jnp.int32)
    if capacity is None:
        return Dispatch(order, place.reshape(-1, tokens), filled)
    start = jnp.cumsum(filled) - filled
    rank = place - start[expert]
    row = jnp.where(rank < capacity, expert * capacity + rank, count * capacity)
    slot = jnp.arange(capacity)[None]
    served = order[jnp.minimum(start[:, None] + slot, order.size - 1)]
    choice = jnp.where(slot < filled[:, None], served, order.size)
    return Dispatch(choice.ravel(), row.reshape(-1, tokens), filled)


def _to_rows(x: Float[Array, "T D"], plan: Dispatch) -> Float[Array, "R D"]:
    choices, tokens = plan.row.size, plan.row.shape[1]
    token = jnp.where(plan.choice < choices, plan.choice % tokens, tokens)
    return _gather(x, token, plan.row)


def _from_rows(y: Float[Array, "R D"], plan: Dispatch) -> Float[Array, "K T D"]:
    return _gather(y, plan.row.ravel(), plan.choice[None]).reshape(*plan.row.shape, y.shape[1])


@jax.custom_vjp
def _gather(
    x: Float[Array, "N D"], index: Int[Array, " M"], back: Int[Array, "K N"]
) -> Float[Array, "M D"]:
    """Return x[index], and 0 where the index is beyond x.

    The derivative is a gather too: `back` says for each row of x which rows of the result are
    copies of it, and is beyond the result where there are fewer.
    """
    return _gather_forward(x, index, back)[0]


def _gather_forward(x: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0), back


def _gather_backward(back: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, back, axis=0, mode="fill", fill_value=0).sum(0), None, None


_gather.defvjp(_gather_forward, _gather_backward)
