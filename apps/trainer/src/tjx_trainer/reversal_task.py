"""Strings of bytes and their reversals: a task that shows whether sequence to sequence works."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

import tjx_data
from tjx_data import reversal
from tjx_nn.encoder_decoder_config import EncoderDecoderConfig
from tjx_trainer.config import Config
from tjx_trainer.run_dir import RunDirectory
from tjx_trainer.step import Batch
from tjx_trainer.task import Opened, Put, Share


def open_reversal(config: Config, _: tjx_data.Progress | None = None) -> Opened:
    """Fit the model's vocabulary to bytes; there is nothing to open.

    Raises
    ------
    ValueError
        If the model has other tokens for padding, start and end, or too few tokens.
    """
    model = config.model
    assert isinstance(model, EncoderDecoderConfig)
    wanted = {
        "pad_id": reversal.PADDING, "start_id": reversal.START, "stop_id": reversal.END,
    }  # fmt: skip
    problems = [
        f"model.{name} is {getattr(model, name)} and byte-reversal has {value}: leave it out"
        for name, value in wanted.items()
        if getattr(model, name) != value
    ]
    if config.train.vocab_from_tokenizer:
        config = replace(config, model=replace(model, vocab_size=reversal.VOCAB_SIZE))
    elif model.vocab_size < reversal.VOCAB_SIZE:
        problems.append(
            f"model.vocab_size is {model.vocab_size} and byte-reversal has {reversal.VOCAB_SIZE} "
            "tokens: leave it out"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return config, lambda share: Reversal(config, share)


class Reversal:
    """Writing strings of bytes backwards.

    Parameters
    ----------
    config : Config
        Resolved.
    share : Share
        This process's rows.
    """

    accuracies: tuple[int, ...] = (1,)
    token_byte_lengths: np.ndarray | None = None

    def __init__(self, config: Config, share: Share) -> None:
        self.config = config

        def loader(
            split: Literal["train", "validation"], batch_size: int
        ) -> tjx_data.ReversalLoader:
            return tjx_data.ReversalLoader(
                max_length=config.data.seq_len,
                split=split,
                batch_size=batch_size,
                seed=config.seed,
                process_index=share.process_index,
                process_count=share.process_count,
            )

        self.train_data = loader("train", share.batch_size)
        self.validation_data = loader("validation", share.evaluation_batch_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint of this run goes with."""
        return {"data": self.train_data.fingerprint}

    @property
    def introduction(self) -> str:
        """What the strings are."""
        return f"random strings of 1 to {self.config.data.seq_len} bytes"

    def batch(self, step: int, put: Put) -> Batch:
        """Return the batch of a step."""
        return self._put(self.train_data.batch(step), put)

    def evaluation_batches(self, put: Put) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield strings that are never trained on."""
        for batch in self.validation_data.evaluation_batches(self.config.train.eval_tokens):
            yield self._put(batch, put), batch["labels"]

    def record(self, run: RunDirectory) -> None:
        """Keep nothing: strings are made up again."""

    def conclusion(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how many strings were written backwards without a mistake."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a byte",
            f"exact match      {metrics['exact_match']:.2%} of the strings, from start to end",
        ]

    @staticmethod
    def _put(batch: Mapping[str, np.ndarray], put: Put) -> Batch:
        mask = batch["source"] != reversal.PADDING
        return put({**batch, "source_mask": mask})
