"""Task dpo: optimization of preferences between two responses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.rl.examples import Example, Split, encode_row, make_example_loaders
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.base_task import LoaderTask
from tjx_trainer.tasks.task import DataShard


class DPOTask(LoaderTask[tjx_data.Loader]):
    """Pairs of a chosen and a rejected response to a prompt.

    Parameters
    ----------
    config, tokenizer, examples, facts, share
        As of `GRPOTask`; the examples have two texts.

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
    ) -> None:
        self.tokenizer = tokenizer

        def rows(example: Example) -> list[tuple[np.ndarray, np.ndarray]]:
            prompt = tokenizer.encode_prompt(example.prompt)
            length = config.data.seq_len
            return [encode_row(tokenizer, prompt, text, length) for text in example.texts]

        encoded = [rows(example) for example in examples["train"]]
        # [examples, 2, T]
        self._tokens, self._labels = (
            np.array([[row[kind] for row in pair] for pair in encoded], np.int32) for kind in (0, 1)
        )
        # The validation loss is that of the chosen responses.
        chosen = [rows(example)[0] for example in examples["validation"]]
        self._counts = (len(encoded), len(chosen))
        super().__init__(
            *make_example_loaders(
                examples, chosen, facts, share, batch_size=share.batch_size, seed=config.seed
            ),
            eval_limit=config.train.eval_tokens,
        )

    @property
    def data_summary(self) -> str:
        """Numbers of pairs."""
        return "{:,} pairs to train on, {:,} held out".format(*self._counts)

    def pairs(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Return the pairs with indices `chosen`, int64 [P]; see `objectives.make_dpo`."""
        labels = self._labels[chosen]
        # The loss is divided by the number of labels of the batch, and shall be a mean over pairs.
        weights = np.full(len(chosen), np.sum(labels >= 0) / len(chosen), np.float32)
        return {"tokens": self._tokens[chosen], "labels": labels, "weights": weights}

    def record(self, run: RunDirectory) -> None:
        """Write the tokenizer to the run directory."""
        self.tokenizer.save(run.tokenizer)

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return the loss of the chosen responses."""
        return [f"validation loss  {metrics['loss']:.4f} nats a token of the chosen responses"]
