"""Losses of the tasks grpo, dpo and kto as functions of the log-probabilities of responses.

A batch of these tasks holds the inputs of the model, "tokens" and "labels" (-100 outside of the
responses), and arrays of the objective, [rows, ...].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import tjx_optim
import tjx_rl
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import Layout
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.train_state import Batch
from tjx_trainer.training.train_step import bind_trained

# (log-probabilities of the labels, mask of the responses, batch) -> sum of losses, other sums.
Objective = Callable[[jax.Array, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]

MODEL_INPUTS = ("tokens", "labels", "dropout_key")


def make_response_loss_sum(config: Config, layout: Layout, base: Any = None) -> tjx_optim.LossSum:
    """Return the differentiated function: from (params, microbatch) to sums over its labels.

    The sums are divided by the number of labels of the batch; the task scales its weights
    accordingly. With adapters, `base` holds the frozen parameters.
    """
    objective = _OBJECTIVES[str(config.task)](config.rl)

    def loss_sum(params: Any, microbatch: Batch) -> tuple[jax.Array, Any]:
        log_probs, penalty = response_log_probs(config, layout, params, microbatch, base)
        mask = microbatch["labels"] != IGNORE_INDEX
        loss, sums = objective(log_probs, mask, microbatch)
        return loss + mask.sum() * penalty, (mask.sum(), {"loss": loss, **sums})

    return loss_sum


def response_log_probs(
    config: Config, layout: Layout, params: Any, batch: Batch, base: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the log-probability of each label, without materializing all logits.

    Parameters
    ----------
    config, layout
        The run, and the sharding of the model.
    params : nested dict of arrays
        The trained parameters: those of the model, or adapters of `base`.
    batch : Batch
        ``tokens`` and ``labels``, int32 [..., T].
    base : nested dict of arrays, optional
        The frozen parameters of a run with adapters.

    Returns
    -------
    float32 [..., T]
        Log-probabilities [nats]; 0 for ignored labels.
    float32 scalar
        Auxiliary losses of the model, as `tjx_nn.Losses.penalty`.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    shape = batch["labels"].shape
    rows = {name: inputs[name].reshape(-1, shape[-1]) for name in ("tokens", "labels")}
    network = bind_trained(config, params, base, layout)
    losses = network.losses(**{**inputs, **rows})
    return -losses.tokens.reshape(shape), losses.penalty


def make_grpo(rl: tjx_rl.RLConfig) -> Objective:
    """Return the policy-gradient loss.

    The batch holds, [B, T] or [B, 1]: ``advantages``; ``weights``, the weight of each token times
    the number of labels in the batch; ``old_log_probs`` of the trainer and ``sampler_log_probs``
    before the update; ``reference_log_probs`` with a KL penalty. With `rl.exact` the values of the
    log-probabilities are the old ones, as the parameters are the same, and their derivatives those
    of the training forward pass; "forward_gap" is the mean difference of the two.
    """
    algorithm = tjx_rl.ALGORITHMS[rl.algorithm]
    clip_high = algorithm.clip_high if rl.clip_high is None else rl.clip_high

    def objective(
        log_probs: jax.Array, mask: jax.Array, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        old, sampler = batch["old_log_probs"], batch["sampler_log_probs"]
        forward_gap = jnp.where(mask, jnp.abs(log_probs - old), 0).sum()
        if rl.exact:
            log_probs = _with_value(log_probs, old)
        importance: jax.Array | float = 1.0
        if rl.importance_cap is None:
            old = sampler
        else:
            importance = tjx_rl.truncated_importance_weights(old, sampler, cap=rl.importance_cap)
        found = tjx_rl.policy_losses(
            log_probs,
            old,
            batch["advantages"],
            clip_low=rl.clip_low,
            clip_high=clip_high,
            importance_weights=importance,
            reference_log_probs=batch.get("reference_log_probs"),
            kl_coefficient=rl.kl_coefficient,
            kl_estimator=rl.kl_estimator,
        )
        loss = jnp.where(mask, batch["weights"] * found.losses, 0).sum()
        sums = {
            # The mean of -log p over sampled tokens is an unbiased estimate of the entropy.
            "entropy": -jnp.where(mask, log_probs, 0).sum(),
            "clip_fraction": (found.clipped & mask).sum().astype(jnp.float32),
        }
        if rl.exact:
            sums["forward_gap"] = forward_gap
        if "reference_log_probs" in batch:
            sums["kl"] = jnp.where(mask, found.kl, 0).sum()
        return loss, sums

    return objective


@jax.custom_jvp
def _with_value(x: jax.Array, value: jax.Array) -> jax.Array:
    """Return `value` with the derivative of `x`."""
    del x
    return value


@_with_value.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def make_dpo(rl: tjx_rl.RLConfig) -> Objective:
    """Return the preference loss.

    The labels are [B, 2, T], the preferred response first. The batch holds ``weights`` [B], the
    number of labels per pair of the batch, and ``reference_log_probs`` [B, 2, T].
    """

    def objective(
        log_probs: jax.Array, mask: jax.Array, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        policy = tjx_rl.sequence_log_probs(log_probs, mask)
        reference = tjx_rl.sequence_log_probs(batch["reference_log_probs"], mask)
        pairs = (policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
        if rl.preference_loss == "ipo":
            losses = tjx_rl.ipo_loss(*pairs, beta=rl.beta)
        else:
            losses = tjx_rl.dpo_loss(*pairs, beta=rl.beta, label_smoothing=rl.label_smoothing)
        rewards = rl.beta * (policy - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        of_pairs = {
            "reward_chosen": rewards[:, 0],
            "reward_rejected": rewards[:, 1],
            "reward_margin": margin,
            "reward_accuracy": (margin > 0).astype(jnp.float32),
        }
        weights = batch["weights"]
        sums = {name: (weights * values).sum() for name, values in of_pairs.items()}
        return (weights * losses).sum(), sums

    return objective


def make_kto(rl: tjx_rl.RLConfig) -> Objective:
    """Return the loss on single responses.

    The batch holds ``desirable``, bool [B]; ``reference_log_probs`` [B, T]; ``reference_points``
    [B], the same number in all rows; ``weights`` [B], the number of labels per response of the
    batch; and ``kind_weights`` [B, 2], the same for means over the desirable and over the
    undesirable responses, 0 in rows of the other kind.
    """

    def objective(
        log_probs: jax.Array, mask: jax.Array, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        policy = tjx_rl.sequence_log_probs(log_probs, mask)
        reference = tjx_rl.sequence_log_probs(batch["reference_log_probs"], mask)
        losses = tjx_rl.kto_loss(
            policy,
            reference,
            batch["desirable"],
            batch["reference_points"],
            beta=rl.beta,
            desirable_weight=rl.desirable_weight,
            undesirable_weight=rl.undesirable_weight,
        )
        weights = batch["weights"]
        rewards = (batch["kind_weights"] * (rl.beta * (policy - reference))[:, None]).sum(0)
        return (weights * losses).sum(), {
            "reward_desirable": rewards[0],
            "reward_undesirable": rewards[1],
            "kl": (weights * batch["reference_points"]).sum(),
        }

    return objective


_OBJECTIVES: Mapping[str, Callable[[tjx_rl.RLConfig], Objective]] = {
    "grpo": make_grpo,
    "dpo": make_dpo,
    "kto": make_kto,
}
