"""Byte reversal: a synthetic sequence-to-sequence task."""

import functools
from collections.abc import Mapping
from typing import Any

import tjx_data
from tjx_data.transforms import byte_reversal
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import LoaderTask, make_loaders
from tjx_trainer.tasks.special_tokens import with_special_tokens
from tjx_trainer.tasks.task import DataShard, OpenedTask


def open_reversal(config: Config, _: tjx_data.Progress | None = None) -> OpenedTask:
    """Fit the model's vocabulary and special tokens to byte strings.

    Raises
    ------
    ValueError
        If the model has other special tokens or too small a vocabulary.
    """
    config = with_special_tokens(
        config,
        "byte-reversal",
        n_ids=byte_reversal.VOCAB_SIZE,
        pad_id=byte_reversal.PADDING,
        start_id=byte_reversal.START,
        stop_id=byte_reversal.END,
    )
    return config, lambda share: ByteReversalTask(config, share)


class ByteReversalTask(LoaderTask[tjx_data.ReversalLoader]):
    """Reversal of random byte strings with an encoder-decoder.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    share : DataShard
        The rows of this process.
    """

    def __init__(self, config: Config, share: DataShard) -> None:
        open_split = functools.partial(tjx_data.ReversalLoader, max_length=config.data.seq_len)
        super().__init__(
            *make_loaders(open_split, config.seed, share), eval_limit=config.train.eval_tokens
        )

    @property
    def data_summary(self) -> str:
        """Lengths of the strings."""
        return f"random strings of 1 to {self.train_data.max_length} bytes"

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss and exact-match accuracy."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a byte",
            f"exact match      {metrics['exact_match']:.2%} of the strings, from start to end",
        ]
