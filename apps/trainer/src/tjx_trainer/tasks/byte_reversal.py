"""Strings of bytes and their reversals: a task that shows whether sequence to sequence works."""

import functools
from collections.abc import Mapping
from typing import Any

import tjx_data
from tjx_data.loading import byte_reversal
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import LoaderTask, make_loaders
from tjx_trainer.tasks.special_tokens import with_special_tokens
from tjx_trainer.tasks.task import DataShard, OpenedTask


def open_reversal(config: Config, _: tjx_data.Progress | None = None) -> OpenedTask:
    """Fit the model's vocabulary to bytes; there is nothing to open.

    Raises
    ------
    ValueError
        If the model has other tokens for padding, start and end, or too few tokens.
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
    """Writing strings of bytes backwards.

    Parameters
    ----------
    config : Config
        Resolved.
    share : Share
        This process's rows.
    """

    def __init__(self, config: Config, share: DataShard) -> None:
        open_split = functools.partial(tjx_data.ReversalLoader, max_length=config.data.seq_len)
        super().__init__(
            *make_loaders(open_split, config.seed, share), eval_limit=config.train.eval_tokens
        )

    @property
    def data_summary(self) -> str:
        """What the strings are."""
        return f"random strings of 1 to {self.train_data.max_length} bytes"

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how many strings were written backwards without a mistake."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a byte",
            f"exact match      {metrics['exact_match']:.2%} of the strings, from start to end",
        ]
