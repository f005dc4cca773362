"""Mixture of experts: top-k router, capacity, and expert MLPs on tokens sorted by expert.

Sorting lets each expert multiply a dense matrix, without an array of tokens x experts x capacity.
Dispatch and combine are gathers in both directions, so gradients are summed in a fixed order.

Axes in names: B batch, T time, D d_model, F hidden features, E experts, K choices of a token,
G groups of tokens that share a capacity, C capacity, R expert rows, N groups of experts, I input
and O output features.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.gated_mlp import apply_gate, make_mlp
from tjx_nn.layers.make_layers import initial_std
from tjx_nn.layers.mlp import ACTIVATIONS
from tjx_nn.layers.scan_layers import AuxLosses
from tjx_nn.layout import ParamSharding, ShardedModule, make_param
from tjx_nn.sub_configs import ExpertsConfig

# Keeps sums of weights positive if all sigmoids underflow; it changes no larger sum.
_SMALLEST = 1e-20


class ExpertKernel(ShardedModule):
    """Float32 kernel and bias of the router, or one of both for each expert.

    Parameters
    ----------
    shape
        Shape of the kernel.
    axes
        Logical axes of the kernel.
    std
        Standard deviation of the normal initializer of the kernel; the bias starts at 0.
    bias
        Whether to add a bias.
    rngs
        Source of random initial values.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        std: float,
        bias: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.axes, self.bias_axes = axes, (*axes[:-2], axes[-1])
        self.kernel = make_param(normal(std)(rngs.params(), shape, jnp.float32), axes)
        zeros = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
        self.bias = make_param(zeros, self.bias_axes) if bias else None

    def batched(self, x: Float[Array, "E G C I"]) -> Float[Array, "E G C O"]:
        """Multiply a fixed number of rows of each expert with its matrix."""
        y: Array = expert_matmul(ParamSharding(self.layout, self.axes), x, self.kernel[...])
        if self.bias is None:
            return y
        return y + self.gather(self.bias, self.bias_axes).astype(y.dtype)[:, None, None]

    def ragged(self, x: Float[Array, "R I"], group_sizes: Int[Array, " E"]) -> Float[Array, "R O"]:
        """Multiply rows sorted by expert, `group_sizes[e]` of expert e, with its matrix."""
        w = self.gather(self.kernel, self.axes).astype(x.dtype)
        y = jax.lax.ragged_dot(x, w, group_sizes)
        if self.bias is None:
            return y
        # As a product, the gradient of the bias is summed in a fixed order.
        b_E1O = self.gather(self.bias, self.bias_axes).astype(y.dtype)[:, None]
        return y + jax.lax.ragged_dot(jnp.ones_like(x[:, :1]), b_E1O, group_sizes)


class Dispatch(NamedTuple):
    """Assignment of token choices to expert rows, in both directions.

    Choices are numbered in the order of service: first choices of all tokens, then second choices,
    and so on.

    Attributes
    ----------
    choice
        Choice in each row, rows of expert 0 first; the number of choices for an empty row.
    row
        Row of each choice; the number of rows for a dropped choice.
    group_sizes
        Number of choices of each expert, dropped ones included.
    """

    choice: Int[Array, " R"]
    row: Int[Array, "K T"]
    group_sizes: Int[Array, " E"]


class Experts(ShardedModule):
    """Mixture of experts that replaces the MLP of a block.

    Each sequence is a group with its own capacity: dropped tokens do not depend on the rest of the
    batch, and groups can be on different devices. First choices take precedence over second ones,
    and earlier tokens over later ones.

    Shazeer et al. 2017, "Outrageously Large Neural Networks"; Lepikhin et al. 2020, "GShard";
    shared experts: Dai et al. 2024, "DeepSeekMoE"; sigmoid scores and groups: DeepSeek-AI 2024,
    "DeepSeek-V3", section 2.1.2.

    Parameters
    ----------
    config
        Configuration of the model; `config.experts` configures the experts.
    rngs
        Source of random initial values.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, f, count = config.d_model, config.expert_dim, config.experts.count
        std = initial_std(config, residual=False)
        down_std = initial_std(config, residual=True)
        up, down = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        bias = config.experts.use_bias
        self.router = ExpertKernel((d, count), ("embed", "expert"), std=std, bias=bias, rngs=rngs)
        zeros = jnp.zeros(count, jnp.float32)
        self.choice_bias = make_param(zeros, ("expert",)) if config.experts.choice_bias else None
        inner = partial(ExpertKernel, (count, d, f), up, std=std, bias=bias, rngs=rngs)
        self.up, self.gate = inner(), inner() if config.gated else None
        self.down = ExpertKernel((count, f, d), down, std=down_std, bias=bias, rngs=rngs)
        shared = config.experts.shared
        self.shared = make_mlp(config, d_ff=shared * f, rngs=rngs) if shared else None

    def __call__(
        self, x: Float[Array, "B T D"], *, drop_tokens: bool = True
    ) -> tuple[Float[Array, "B T D"], AuxLosses]:
        """Route each token to its experts and sum their weighted outputs.

        Parameters
        ----------
        x
            Normalized residual stream.
        drop_tokens
            Whether to enforce the capacity of an expert, `capacity_factor` times its equal share of
            a sequence's tokens, rounded up. Choices beyond it contribute 0.

        Returns
        -------
        y
            Output, same shape and dtype as `x`.
        aux_losses
            "balance_loss" (1 for balanced load; Fedus et al. 2021, "Switch Transformers", section
            2.2, with sigmoid scores divided by their sum), "router_z_loss" (mean squared
            log-sum-exp of router logits; Zoph et al. 2022, "ST-MoE", section 3.2) and "dropped"
            (fraction of choices over capacity).
        """
        experts = self.config.experts
        batch, tokens, d = x.shape
        # Capacity is first come, first served: it needs whole sequences in their original order.
        x = self.layout.place(self.layout.restore(x), ("batch", None, "embed"))
        if x.size == 0:
            zero = jnp.zeros((), jnp.float32)
            return x, {"balance_loss": zero, "router_z_loss": zero, "dropped": zero}
        factor = experts.capacity_factor if drop_tokens else None
        share = experts.per_token * tokens / experts.count
        # A token chooses an expert at most once: no capacity exceeds the number of tokens.
        capacity = None if factor is None else min(math.ceil(factor * share), tokens)
        x_GTD = x.reshape(1, batch * tokens, d) if capacity is None else x
        weights_GTK, chosen_GTK, aux_losses = self._route(x_GTD)
        dispatch = jax.vmap(lambda chosen: _dispatch(chosen, experts.count, capacity))(chosen_GTK)
        rows_GRD = jax.vmap(_to_rows)(x_GTD, dispatch)
        if experts.scale_inputs:
            scales_GR1 = jax.vmap(_row_weights)(weights_GTK, dispatch)
            rows_GRD = (scales_GR1 * rows_GRD).astype(x.dtype)
            weights_GTK = jnp.ones_like(weights_GTK)
        y_GRD = self._ragged(rows_GRD, dispatch) if capacity is None else self._batched(rows_GRD)
        y_GKTD = jax.vmap(_from_rows)(y_GRD, dispatch)
        weights_GKT1 = rearrange(weights_GTK, "g t k -> g k t 1")
        y = (weights_GKT1 * y_GKTD).sum(1).astype(x.dtype).reshape(x.shape)
        y = y if self.shared is None else y + self.shared(x)
        is_dropped_GKT = dispatch.row == rows_GRD.shape[1]
        aux_losses["dropped"] = is_dropped_GKT.astype(jnp.float32).mean()
        return self.layout.reorder(y), aux_losses

    def _route(
        self, x: Float[Array, "G T D"]
    ) -> tuple[Float32[Array, "G T K"], Int[Array, "G T K"], AuxLosses]:
        """Return the weights and ids of each token's experts, best first, and the router losses."""
        experts = self.config.experts
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.router.gather(self.router.kernel, self.router.axes),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.router.bias is not None:
            logits += self.router.gather(self.router.bias, self.router.bias_axes)[None, None]
        scores = jax.nn.softmax(logits, -1)
        probabilities = scores
        if experts.scores == "sigmoid":
            scores = jax.nn.sigmoid(logits)
            probabilities = scores / (scores.sum(-1, keepdims=True) + _SMALLEST)
        bias_E = None if self.choice_bias is None else self.gather(self.choice_bias, ("expert",))
        # The gradient of the values of `top_k` is a scatter; that of a masked sum is not.
        choice_scores = _choice_scores(experts, jax.lax.stop_gradient(scores), bias_E)
        chosen = jax.lax.top_k(choice_scores, experts.per_token)[1]
        is_chosen_GTKE = chosen[..., None] == jnp.arange(experts.count)[None, None, None]
        weights = jnp.where(is_chosen_GTKE, scores[..., None, :], 0).sum(-1)
        if experts.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + _SMALLEST)
        if experts.weight_scale != 1:
            weights = weights * experts.weight_scale
        load = is_chosen_GTKE.sum((0, 1, 2)) / chosen.size
        balance = experts.count * (load * probabilities.mean((0, 1))).sum()
        if bias_E is not None:  # adds 0, with the excess load as the gradient of the bias
            balance += ((experts.count * load - 1) * (bias_E - jax.lax.stop_gradient(bias_E))).sum()
        z_loss = jnp.square(jax.nn.logsumexp(logits, -1)).mean()
        return weights, chosen, {"balance_loss": balance, "router_z_loss": z_loss}

    def _ragged(self, rows: Float[Array, "1 R D"], dispatch: Dispatch) -> Float[Array, "1 R D"]:
        """Apply the experts without capacity: contiguous rows, any number of each expert."""
        sizes = dispatch.group_sizes[0]
        return self._mlp(rows[0], lambda kernel, x: kernel.ragged(x, sizes))[None]

    def _batched(self, rows: Float[Array, "G R D"]) -> Float[Array, "G R D"]:
        """Apply the experts with capacity: the same number of rows of each expert."""
        rows_GECD = rearrange(rows, "g (e c) d -> g e c d", e=self.config.experts.count)
        x_EGCD = rearrange(self.layout.to_experts(rows_GECD), "g e c d -> e g c d")
        y_GECD = rearrange(self._mlp(x_EGCD, ExpertKernel.batched), "e g c d -> g e c d")
        return rearrange(self.layout.from_experts(y_GECD), "g e c d -> g (e c) d")

    def _mlp(
        self, x: Float[Array, "*rows D"], product: Callable[[ExpertKernel, Array], Array]
    ) -> Float[Array, "*rows D"]:
        hidden = product(self.up, x)
        if self.gate is None:
            return product(self.down, ACTIVATIONS[self.config.activation](hidden))
        return product(self.down, apply_gate(self.config, product(self.gate, x), hidden))


def _choice_scores(
    experts: ExpertsConfig, scores: Float32[Array, "G T E"], bias: Float32[Array, " E"] | None
) -> Float32[Array, "G T E"]:
    """Return the scores by which tokens choose experts, -inf outside of their best groups."""
    if bias is not None:
        scores = scores + jax.lax.stop_gradient(bias)[None, None]
    if experts.groups_per_token == experts.groups:
        return scores
    scores_GTNE = rearrange(scores, "g t (n e) -> g t n e", n=experts.groups)
    group_scores_GTN = jax.lax.top_k(scores_GTNE, experts.group_top_k)[0].sum(-1)
    best = jax.lax.top_k(group_scores_GTN, experts.groups_per_token)[1]
    is_best_GTN = (best[..., None] == jnp.arange(experts.groups)[None, None, None]).any(2)
    allowed = jnp.where(is_best_GTN[..., None], scores_GTNE, -jnp.inf)
    return rearrange(allowed, "g t n e -> g t (n e)")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_matmul(
    sharding: ParamSharding, x: Float[Array, "E G C I"], w: Float[Array, "E I O"]
) -> Float[Array, "E G C O"]:
    """Multiply the rows of each expert with its matrix, in the dtype of `x`.

    As `tjx_nn.layers.linear.matmul`, the gradient of the weight is summed in float32.
    """
    return jnp.einsum("egci,eio->egco", x, sharding.gather(w, x.dtype))


def _expert_matmul_forward(
    sharding: ParamSharding, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return expert_matmul(sharding, x, w), (x, w)


def _expert_matmul_backward(
    sharding: ParamSharding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    dw = jnp.einsum("egci,egco->eio", x, dy, preferred_element_type=sharding.sum_dtype(x))
    dx = jnp.einsum("egco,eio->egci", dy, sharding.gather(w, x.dtype))
    return dx, sharding.scatter(dw, w.dtype)


expert_matmul.defvjp(_expert_matmul_forward, _expert_matmul_backward)


def _dispatch(chosen: Int[Array, "T K"], count: int, capacity: int | None) -> Dispatch:
    """Assign each choice of each token to a row: first choices first, then by token."""
    tokens = chosen.shape[0]
    expert = chosen.T.ravel()  # of each choice, in the order of service
    order = jnp.argsort(expert, stable=True)
    rank = jnp.argsort(order)  # of each choice among all choices sorted by expert
    group_sizes = (expert[:, None] == jnp.arange(count)[None]).sum(0, dtype=jnp.int32)
    if capacity is None:
        return Dispatch(order, rank.reshape(-1, tokens), group_sizes)
    start = jnp.cumsum(group_sizes) - group_sizes
    slot = rank - start[expert]
    row = jnp.where(slot < capacity, expert * capacity + slot, count * capacity)
    slots = jnp.arange(capacity)[None]
    served = order[jnp.minimum(start[:, None] + slots, order.size - 1)]
    choice = jnp.where(slots < group_sizes[:, None], served, order.size)
    return Dispatch(choice.ravel(), row.reshape(-1, tokens), group_sizes)


def _to_rows(x: Float[Array, "T D"], dispatch: Dispatch) -> Float[Array, "R D"]:
    choices, tokens = dispatch.row.size, dispatch.row.shape[1]
    token = jnp.where(dispatch.choice < choices, dispatch.choice % tokens, tokens)
    return _gather(x, token, dispatch.row)


def _row_weights(weights: Float32[Array, "T K"], dispatch: Dispatch) -> Float32[Array, "R 1"]:
    """Return the weight of the choice in each row, 0 for an empty row."""
    return _gather(weights.T.reshape(-1, 1), dispatch.choice, dispatch.row.reshape(1, -1))


def _from_rows(y: Float[Array, "R D"], dispatch: Dispatch) -> Float[Array, "K T D"]:
    rows = _gather(y, dispatch.row.ravel(), dispatch.choice[None])
    return rows.reshape(*dispatch.row.shape, y.shape[1])


@jax.custom_vjp
def _gather(
    x: Float[Array, "N D"], index: Int[Array, " M"], inverse: Int[Array, "K N"]
) -> Float[Array, "M D"]:
    """Gather x[index], with 0 for an index beyond x; the derivative is a gather too.

    Parameters
    ----------
    x
        Rows to gather from.
    index
        Row of x for each row of the result.
    inverse
        Rows of the result that copy each row of x, padded with indices beyond the result.
    """
    return _gather_forward(x, index, inverse)[0]


def _gather_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0), inverse


def _gather_backward(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, inverse, axis=0, mode="fill", fill_value=0).sum(0), None, None


_gather.defvjp(_gather_forward, _gather_backward)
