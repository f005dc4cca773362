"""Settings of reinforcement learning and preference optimization. Imports no JAX."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_core import ConfigError, Problem, unknown_name
from tjx_rl.environments import registered_environments

AlgorithmName = Literal["grpo", "dr_grpo", "dapo", "reinforce_pp", "rloo"]
PreferenceLoss = Literal["dpo", "ipo"]
KLEstimator = Literal["k1", "k2", "k3"]
VerifierName = Literal["numeric", "exact", "regex", "json_schema", "unit_tests"]

# Algorithms whose KL penalty is part of the loss; that of the others is part of the reward.
_KL_IN_LOSS = ("grpo", "dr_grpo", "dapo")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Settings of the tasks grpo (samples and verifiers), dpo (pairs) and kto (single responses).

    Attributes
    ----------
    algorithm
        Of task grpo: grpo, dr_grpo, dapo, reinforce_pp or rloo.
    samples_per_prompt
        Responses to each prompt of a batch; divides train.batch_size.
    max_new_tokens
        Largest length of a response [tokens], its end-of-text token included.
    minibatches
        Parts of the batch of responses, with an update for each; divides train.batch_size.
    epochs
        Passes over the batch of responses.
    skip_equal_groups
        Leave prompts out of the loss whose responses all have the same reward (the first half of
        dynamic sampling in DAPO); otherwise they count in its mean with a gradient of 0.
    clip_low
        Ratios of probabilities are clipped to at least 1 - clip_low. In the first update after a
        rollout they differ from 1 only by the numerics of sampler and trainer.
    clip_high
        Ratios are clipped to at most 1 + clip_high; none: 0.28 for dapo, else 0.2.
    kl_coefficient
        Weight of the divergence from the initial model in the loss; 0 keeps no reference model.
    kl_estimator
        Estimator of that divergence: k1, k2 or k3.
    importance_cap
        Largest weight of a token in the correction of differences between the log-probabilities of
        sampler and trainer; none: the clipped ratio is relative to the sampler instead.
    slots
        Largest number of responses that are sampled at once, over all devices: one that ends makes
        room for the next. none: all at once, until the longest ends.
    exact
        Compute the log-probabilities of the trainer and of the initial model by the program that
        samples, so that those of sampler and trainer are the same bits and the ratio of their
        probabilities is 1; with one update per rollout. Gradients are those of the training
        forward pass.
    verifier
        Reward of a response: numeric (its last number equals the answer), exact (the same text
        without surrounding white space), regex (the answer is a pattern that matches all of it),
        json_schema (the answer is a schema), unit_tests (the answer is a Python program that runs
        after the response, in a process with limits and without network).
    environment
        Environment of episodes with several turns: calculator, or a registered one, whose module is
        imported if the name has a dot; its rewards replace those of the verifier. none: a prompt
        has one response.
    max_turns
        Largest number of responses of an episode.
    chat
        Make each prompt a message of the user, by the chat template of the initial model, whose end
        of turn then ends a response.
    eval_prompts
        Held-out prompts per evaluation, answered greedily.
    eval_samples
        Responses to each held-out prompt that are sampled to estimate pass@k; 0 samples none.
    preference_loss
        Of task dpo: dpo or ipo.
    beta
        Of the tasks dpo and kto: strength of the constraint to the reference model.
    label_smoothing
        Of preference_loss dpo: probability that a preference is wrong.
    desirable_weight
        Of task kto: weight of the loss of desirable responses. The paper advises weights whose
        products with the numbers of the responses have a ratio from 1 to 4/3.
    undesirable_weight
        Of task kto: weight of the loss of undesirable responses.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    algorithm: AlgorithmName = "grpo"
    samples_per_prompt: int = 8
    max_new_tokens: int = 32
    minibatches: int = 1
    epochs: int = 1
    skip_equal_groups: bool = False
    clip_low: float = 0.2
    clip_high: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    importance_cap: float | None = 2.0
    slots: int | None = None
    exact: bool = False
    verifier: VerifierName = "numeric"
    environment: str | None = None
    max_turns: int = 4
    chat: bool = False
    eval_prompts: int = 200
    eval_samples: int = 0
    preference_loss: PreferenceLoss = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            unknown_name(name, getattr(self, name), get_args(kind))
            for name, kind in (
                ("algorithm", AlgorithmName),
                ("preference_loss", PreferenceLoss),
                ("kl_estimator", KLEstimator),
                ("verifier", VerifierName),
            )
            if getattr(self, name) not in get_args(kind)
        ]
        least = {
            "samples_per_prompt": 2, "max_new_tokens": 1, "minibatches": 1, "epochs": 1,
            "eval_prompts": 1, "eval_samples": 0, "max_turns": 1, "slots": 1,
        }  # fmt: skip
        problems += [
            Problem(name, f"got {value}; expected at least {minimum}")
            for name, minimum in least.items()
            if (value := getattr(self, name)) is not None and value < minimum
        ]
        ranges = {
            "clip_low": (0, 1), "clip_high": (0, math.inf), "kl_coefficient": (0, math.inf),
            "importance_cap": (1, math.inf), "beta": (0, math.inf), "label_smoothing": (0, 0.5),
            "desirable_weight": (0, math.inf), "undesirable_weight": (0, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            positive = name == "beta" or name.endswith("desirable_weight")
            if value is not None and not (low <= value < high and (value or not positive)):
                rule = f"above {low}" if positive else f"at least {low}"
                limit = "a finite number" if high == math.inf else f"below {high}"
                problems.append(Problem(name, f"got {value}; expected {rule} and {limit}"))
        if self.kl_coefficient and self.algorithm not in _KL_IN_LOSS:
            message = (
                f"got {self.kl_coefficient} with algorithm {self.algorithm}; expected 0, or one of "
                f"{', '.join(_KL_IN_LOSS)}, whose penalty is part of the loss; change one of them"
            )
            problems.append(Problem("kl_coefficient", message, ("algorithm",)))
        if self.exact and self.updates_per_rollout > 1:
            message = (
                f"got true with {self.updates_per_rollout} updates on each rollout; expected one, "
                "as later updates have other parameters than the sampler; give minibatches 1 and "
                "epochs 1, or leave it out"
            )
            problems.append(Problem("exact", message, ("minibatches", "epochs")))
        if self.exact and self.slots is not None:
            message = "got true with slots, whose program has other bits; leave one of them out"
            problems.append(Problem("exact", message, ("slots",)))
        if self.environment is None:
            if self.max_turns != type(self).max_turns:
                message = f"got {self.max_turns} without environment; expected both; give one"
                problems.append(Problem("max_turns", message, ("environment",)))
        elif self.environment not in registered_environments:
            register = "tjx_rl.register_environment"
            known = ["none", *registered_environments]
            problems.append(unknown_name("environment", self.environment, known, register=register))
        elif self.exact:
            message = (
                "got true with an environment; expected responses without observations; leave one "
                "of them out"
            )
            problems.append(Problem("exact", message, ("environment",)))
        if self.label_smoothing and self.preference_loss != "dpo":
            message = (
                f"got {self.label_smoothing} with preference_loss {self.preference_loss}; expected "
                "0, or preference_loss dpo; change one of them"
            )
            problems.append(Problem("label_smoothing", message, ("preference_loss",)))
        if problems:
            raise ConfigError(problems)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates on each batch of responses."""
        return self.minibatches * self.epochs
