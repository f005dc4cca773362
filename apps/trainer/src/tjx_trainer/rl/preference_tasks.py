"""Tasks dpo and kto: optimization of preferences between and of single responses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.rl.examples import Example, Split, encode_row, make_example_loaders, make_row
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.base_task import LoaderTask
from tjx_trainer.tasks.task import DataShard


class PreferenceTask(LoaderTask[tjx_data.Loader]):
    """Base class: responses that are preferred, whose loss is the validation loss.

    Parameters
    ----------
    config, tokenizer, examples, facts, share
        As of `GRPOTask`; the examples have responses instead of an answer.
    preferred : list of Example
        The held-out examples whose first text is a good response.

    Raises
    ------
    ValueError
        If a prompt and a response exceed ``data.seq_len``.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: tjx_data.Tokenizer,
        examples: Mapping[Split, list[Example]],
        facts: Mapping[str, str],
        share: DataShard,
        *,
        preferred: list[Example],
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._counts = tuple(map(len, examples.values()))
        rows = [self._rows(example)[0] for example in preferred]
        super().__init__(
            *make_example_loaders(
                examples, rows, facts, share, batch_size=share.batch_size, seed=config.seed
            ),
            eval_limit=config.train.eval_tokens,
        )

    def _rows(self, example: Example) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return tokens and labels of the prompt with each of the texts."""
        prompt = self.tokenizer.encode_prompt(example.prompt)
        length = self.config.data.seq_len
        return [encode_row(self.tokenizer, prompt, text, length) for text in example.texts]

    def record(self, run: RunDirectory) -> None:
        """Write the tokenizer to the run directory."""
        self.tokenizer.save(run.tokenizer)

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return the loss of the preferred responses."""
        return [f"validation loss  {metrics['loss']:.4f} nats a token of the preferred responses"]


class DPOTask(PreferenceTask):
    """Pairs of a chosen and a rejected response to a prompt.

    Parameters
    ----------
    config, tokenizer, examples, facts, share
        As of `PreferenceTask`; the examples have two texts.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: tjx_data.Tokenizer,
        examples: Mapping[Split, list[Example]],
        facts: Mapping[str, str],
        share: DataShard,
    ) -> None:
        held_out = examples["validation"]
        super().__init__(config, tokenizer, examples, facts, share, preferred=held_out)
        encoded = [self._rows(example) for example in examples["train"]]
        # [examples, 2, T]
        self._tokens, self._labels = (
            np.array([[row[kind] for row in pair] for pair in encoded], np.int32) for kind in (0, 1)
        )

    @property
    def data_summary(self) -> str:
        """Numbers of pairs."""
        return "{:,} pairs to train on, {:,} held out".format(*self._counts)

    def pairs(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Return the pairs with indices `chosen`, int64 [P]; see `objectives.make_dpo`."""
        labels = self._labels[chosen]
        return {"tokens": self._tokens[chosen], "labels": labels, "weights": _mean_weights(labels)}


class KTOTask(PreferenceTask):
    """Single responses that are desirable or not.

    Parameters
    ----------
    config, tokenizer, examples, facts, share
        As of `PreferenceTask`; the examples have one text and a label.

    Raises
    ------
    ValueError
        Also if the labels of the training examples are all equal, or those held out all false.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: tjx_data.Tokenizer,
        examples: Mapping[Split, list[Example]],
        facts: Mapping[str, str],
        share: DataShard,
    ) -> None:
        train, held_out = examples["train"], [e for e in examples["validation"] if e.label]
        self._desirable = np.array([example.label for example in train], bool)
        if not held_out or self._desirable.all() or not self._desirable.any():
            raise ValueError(
                f"data.path: got {config.data.path} with {self._desirable.sum()} desirable of "
                f"{len(train)} training examples and {len(held_out)} of "
                f"{len(examples['validation'])} held out; expected desirable ones in both and "
                "undesirable ones to train on; give more examples"
            )
        super().__init__(config, tokenizer, examples, facts, share, preferred=held_out)
        encoded = [self._rows(example)[0] for example in train]
        self._tokens, self._labels = (
            np.array([row[kind] for row in encoded], np.int32) for kind in (0, 1)
        )  # [examples, T]

    @property
    def data_summary(self) -> str:
        """Numbers of examples, and the balance of their weights."""
        rl, desirable = self.config.rl, int(self._desirable.sum())
        undesirable = len(self._desirable) - desirable
        ratio = rl.desirable_weight * desirable / (rl.undesirable_weight * undesirable)
        return (
            f"{desirable:,} desirable and {undesirable:,} undesirable responses to train on, "
            f"{self._counts[1]:,} held out; weights {ratio:.2f} : 1 (1 to 1.33 : 1 is advised)"
        )

    def responses(self, chosen: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return examples, and their prompts with unrelated responses.

        Parameters
        ----------
        chosen : int64 [B]
            Indices of the examples.

        Returns
        -------
        dict of arrays
            The batch without the log-probabilities; see `objectives.make_kto`.
        dict of arrays
            ``tokens`` and ``labels``, int32 [B, T]: each prompt with the response of the next
            example of the batch, cut off at T, for the reference point.
        """
        tokens, labels = self._tokens[chosen], self._labels[chosen]
        is_desirable, weights = self._desirable[chosen], _mean_weights(labels)
        kinds = np.stack([is_desirable, ~is_desirable], 1)
        counts = kinds.sum(0)
        # The mean over a kind that the batch does not have is NaN.
        shares = np.where(counts > 0, counts / len(chosen), np.nan)
        batch = {
            "tokens": tokens,
            "labels": labels,
            "desirable": is_desirable,
            "weights": weights,
            "kind_weights": (weights[:, None] * kinds / shares).astype(np.float32),
        }
        return batch, _unrelated(tokens, labels)


def _unrelated(tokens: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    length = tokens.shape[1]
    starts = (labels >= 0).argmax(1).tolist()
    prompts = [row[: start + 1].tolist() for row, start in zip(tokens, starts, strict=True)]
    responses = [row[row >= 0].tolist() for row in np.roll(labels, -1, 0)]
    rows = [
        make_row(prompt, response[: length + 1 - len(prompt)], length)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    found = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    return dict(zip(("tokens", "labels"), found, strict=True))


def _mean_weights(labels: np.ndarray) -> np.ndarray:
    """Return equal weights, float32 [B], of a mean over examples.

    The loss is divided by the number of labels of the batch, so this number is part of them.
    """
    return np.full(len(labels), np.sum(labels >= 0) / len(labels), np.float32)
