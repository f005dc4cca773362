"""Task grpo: reinforcement learning with verifiable rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import tjx_data
import tjx_rl
from tjx_data.loading.base import IGNORED_LABEL
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.rl.episodes import Episode, run_episodes
from tjx_trainer.rl.examples import Example, Split, make_example_loaders, make_row
from tjx_trainer.rl.prompt_format import PromptFormat
from tjx_trainer.rl.rollouts import (
    Rollouts,
    sample_responses,
    saved_by_slots,
    score_responses,
)
from tjx_trainer.rl.row_exchange import compute_rows, own_rows
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.base_task import LoaderTask
from tjx_trainer.tasks.task import DataShard

_SHOWN = 6  # responses in a sample


class GRPOTask(LoaderTask[tjx_data.Loader]):
    """Prompts whose responses a verifier rewards.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    form : PromptFormat
        Encoding of prompts and responses.
    examples : mapping
        Prompts and answers of both splits.
    facts : mapping of str to str
        What else determines the run, such as the reference model.
    share : DataShard
        The rows of this process.

    Raises
    ------
    ValueError
        If a prompt leaves no room for a response in ``data.seq_len``.
    """

    def __init__(
        self,
        config: Config,
        form: PromptFormat,
        examples: Mapping[Split, list[Example]],
        facts: Mapping[str, str],
        share: DataShard,
    ) -> None:
        self.config, self.form, self._examples = config, form, examples
        self._prompts: dict[Split, list[list[int]]] = {
            split: [form.encode_prompt(each.prompt) for each in some]
            for split, some in examples.items()
        }
        room = config.data.seq_len + 1 - config.rl.max_new_tokens
        longest = max(len(prompt) for some in self._prompts.values() for prompt in some)
        if longest > room:
            raise ValueError(
                f"data.seq_len: got {config.data.seq_len} with a prompt of {longest} tokens; "
                f"expected at least {longest + config.rl.max_new_tokens - 1} with "
                f"rl.max_new_tokens={config.rl.max_new_tokens}; give a longer --data.seq_len"
            )
        held_out = zip(self._prompts["validation"], examples["validation"], strict=True)
        rows = [
            make_row(prompt, form.encode_response(each.prompt, each.texts[0]), config.data.seq_len)
            for prompt, each in held_out
        ]
        super().__init__(
            *make_example_loaders(
                examples, rows, facts, share, seed=config.seed,
                batch_size=share.batch_size // config.rl.samples_per_prompt,
            ),
            eval_limit=config.train.eval_tokens,
        )  # fmt: skip

    @property
    def data_summary(self) -> str:
        """Numbers of prompts, and the verifier."""
        train, held_out = (len(some) for some in self._examples.values())
        return (
            f"{train:,} prompts to train on, {held_out:,} held out, rewarded by the {self._judge}"
        )

    @property
    def _judge(self) -> str:
        rl = self.config.rl
        if rl.environment is None:
            return f"verifier {rl.verifier}"
        return f"environment {rl.environment} in at most {rl.max_turns} turns"

    def roll_out(
        self, step: int, chosen: np.ndarray, params: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Sample and reward responses to prompts; the result is the same in all processes.

        Parameters
        ----------
        step : int
            The training step.
        chosen : int64 [P]
            Indices of the prompts.
        params : nested dict of arrays
            The current parameters.

        Returns
        -------
        dict of arrays
            The batch without the trainer's log-probabilities, B = P * samples_per_prompt rows; see
            `objectives.make_grpo`.
        dict of float
            Metrics by name.
        """
        rl, length = self.config.rl, self.config.data.seq_len
        indices = np.repeat(chosen, rl.samples_per_prompt).tolist()
        prompts = [self._prompts["train"][i] for i in indices]
        samples = rl.samples_per_prompt
        episodes = self._respond("train", indices, params, step=step, samples=samples)
        rewards = np.array([episode.score for episode in episodes], np.float32)
        pairs = [*zip(prompts, episodes, strict=True)]
        rows = [make_row(prompt, episode.tokens, length) for prompt, episode in pairs]
        tokens, labels = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        log_probs = np.zeros(labels.shape, np.float32)
        for label, row, (prompt, episode) in zip(labels, log_probs, pairs, strict=True):
            part = slice(len(prompt) - 1, len(prompt) - 1 + len(episode.tokens))
            row[part] = episode.log_probs
            label[part][~np.array(episode.is_sampled)] = IGNORED_LABEL
        mask = labels >= 0
        groups = rewards.reshape(-1, rl.samples_per_prompt)
        is_informative = groups.std(1) > 0
        batch = {
            "tokens": tokens,
            "labels": labels,
            "advantages": advantages_of(rl, rewards)[:, None],
            "weights": weights_of(rl, mask, np.repeat(is_informative, rl.samples_per_prompt)),
            "sampler_log_probs": log_probs,
        }
        lengths = mask.sum(1)
        metrics = {
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std()),
            "pass_rate": float((rewards == 1).mean()),
            "informative_groups": float(is_informative.mean()),
            "response_length": float(lengths.mean()),
            "truncated": 1 - float(np.mean([episode.ended for episode in episodes])),
            "verifier_failures": float(sum(each.failure is not None for each in episodes)),
        }
        if rl.slots is not None and rl.environment is None:
            metrics["decode_saved"] = saved_by_slots(params, lengths, rl.slots)
        if rl.environment is not None:
            metrics["turns"] = float(np.mean([episode.turns for episode in episodes]))
        return batch, metrics

    def evaluate_responses(self, params: dict[str, Any], /) -> dict[str, float]:
        """Answer held-out prompts; return the metrics of the responses.

        These are the accuracy and mean length of greedy responses, and with ``rl.eval_samples`` k
        the shares of the prompts that one and at least one of k sampled responses pass.
        """
        count, k = self.config.rl.eval_prompts, self.config.rl.eval_samples
        episodes = self._answer_held_out(params, count)
        metrics = {
            "accuracy": float(np.mean([episode.score for episode in episodes])),
            "response_length": float(np.mean([sum(each.is_sampled) for each in episodes])),
        }
        if k:
            passed = np.array([
                [episode.score == 1 for episode in self._answer_held_out(params, count, draw)]
                for draw in range(k)
            ])  # fmt: skip
            metrics |= {"pass_at_1": float(passed.mean())}
            metrics |= {f"pass_at_{k}": float(passed.any(0).mean())}
        return metrics

    def sample(self, params: dict[str, Any], /) -> str | None:
        """Return some held-out prompts with greedy responses and their rewards."""
        episodes = self._answer_held_out(params, _SHOWN)
        prompts = [each.prompt for each in self._examples["validation"][: len(episodes)]]
        space = "" if self.form.template is None else " "
        return "\n".join(
            f"{prompt}{space}{self.form.decode_response(each.tokens)}  reward {each.score:g}"
            for prompt, each in zip(prompts, episodes, strict=True)
        )

    def record(self, run: RunDirectory) -> None:
        """Write the tokenizer and the chat template to the run directory."""
        self.form.tokenizer.save(run.tokenizer)
        if self.form.template is not None:
            self.form.template.save(run.path)

    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return accuracy on held-out prompts, loss of the answers, and samples."""
        found = self.evaluate_responses(params)
        return [
            "samples", "--------", str(self.sample(params)), "--------",
            f"accuracy         {found['accuracy']:.2%} of the held-out prompts, greedily",
            f"validation loss  {metrics['loss']:.4f} nats a token of the answers",
        ]  # fmt: skip

    def _answer_held_out(self, params: Any, count: int, draw: int | None = None) -> list[Episode]:
        """Answer the first held-out prompts greedily, or sample the responses of a draw."""
        indices = list(range(len(self._prompts["validation"][:count])))
        return self._respond("validation", indices, params, step=draw or 0, greedy=draw is None)

    def _respond(
        self,
        split: Split,
        indices: list[int],
        params: Any,
        *,
        step: int,
        greedy: bool = False,
        samples: int = 1,
    ) -> list[Episode]:
        """Sample and score the episodes of prompts, of which `samples` in a row are equal."""
        config, rl = self.config, self.config.rl
        assert isinstance(config.model, GPTConfig)
        model, examples = config.model, [self._examples[split][i] for i in indices]
        make = None if rl.environment is None else tjx_rl.registered_environments[rl.environment]
        max_context = config.data.seq_len + 1 - rl.max_new_tokens

        def sample(contexts: Sequence[Sequence[int]], turn: int) -> Rollouts:
            return sample_responses(
                model, params, contexts, max_new_tokens=rl.max_new_tokens,
                stop_token=self.form.stop_token, seed=config.seed, step=step, turn=turn,
                greedy=greedy, samples=1 if turn else samples, slots=rl.slots,
                columns=None if make is None else max_context,
                exact_columns=config.data.seq_len if rl.exact and not greedy else None,
            )  # fmt: skip

        environments = None
        if make is not None:
            environments = {
                i: make(examples[i].prompt, examples[i].texts[0]) for i in own_rows(len(examples))
            }
        episodes = run_episodes(
            self.form,
            [self._prompts[split][i] for i in indices],
            environments,
            sample,
            max_turns=rl.max_turns,
            max_context=max_context,
        )
        if make is None:

            def verify(rows: range) -> list[tjx_rl.Verdict]:
                texts = [self.form.decode_response(episodes[row].tokens) for row in rows]
                answers = [examples[row].texts[0] for row in rows]
                return tjx_rl.verify(rl.verifier, texts, answers)

            verdicts = compute_rows(len(episodes), verify)
            for episode, (score, failure) in zip(episodes, verdicts, strict=True):
                episode.score, episode.failure = score, failure
        return episodes

    def score_exactly(self, params: Any, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of rows by the program that samples, float32 [B, T]."""
        assert isinstance(self.config.model, GPTConfig)
        return score_responses(
            self.config.model, params, tokens, labels,
            max_new_tokens=self.config.rl.max_new_tokens, stop_token=self.form.stop_token,
        )  # fmt: skip


def weights_of(rl: tjx_rl.RLConfig, mask: np.ndarray, is_informative: np.ndarray) -> np.ndarray:
    """Return the weight of each token times the number of labels of its minibatch, float32 [B, T].

    Parameters
    ----------
    rl : RLConfig
        The settings.
    mask : bool [B, T]
        True for tokens of the responses.
    is_informative : bool [B]
        Whether the rewards of a response's group differ.
    """
    kept = is_informative if rl.skip_equal_groups else np.ones_like(is_informative)
    weights = np.zeros(mask.shape, np.float32)
    if kept.any():
        weights[kept] = tjx_rl.token_weights(
            mask[kept], tjx_rl.ALGORITHMS[rl.algorithm].aggregation,
            max_length=rl.max_new_tokens * (1 if rl.environment is None else rl.max_turns),
        )  # fmt: skip
    # The loss of a minibatch is divided by its labels; the mean over minibatches is the loss.
    for part in range(rl.minibatches):
        rows = slice(part, None, rl.minibatches)
        weights[rows] *= rl.minibatches * mask[rows].sum()
    return weights


def advantages_of(rl: tjx_rl.RLConfig, rewards: np.ndarray) -> np.ndarray:
    """Return the advantages of an algorithm, float32 [B]."""
    kind, size = tjx_rl.ALGORITHMS[rl.algorithm].advantages, rl.samples_per_prompt
    if kind == "leave_one_out":
        found = tjx_rl.leave_one_out_advantages(rewards, size)
    elif kind == "whitened":
        found = tjx_rl.whiten(rewards, np.ones(rewards.shape, bool))
    else:
        found = tjx_rl.group_advantages(rewards, size, scale=kind == "group_scaled")
    return np.asarray(found, np.float32)
