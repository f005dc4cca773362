"""Strings of bytes and their reversals: a task that shows whether sequence to sequence works."""

import functools
from collections.abc import Mapping
from typing import Any

import tjx_data
from tjx_data.loading import reversal
from tjx_trainer.config import Config
from tjx_trainer.loader_task import LoaderTask, both_splits
from tjx_trainer.pair_ids import with_pair_ids
from tjx_trainer.task import Opened, Share


def open_reversal(config: Config, _: tjx_data.Progress | None = None) -> Opened:
    """Fit the model's vocabulary to bytes; there is nothing to open.

    Raises
    ------
    ValueError
        If the model has other tokens for padding, start and end, or too few tokens.
    """
    config = with_pair_ids(
        config,
        "byte-reversal",
        n_ids=reversal.VOCAB_SIZE,
        pad_id=reversal.PADDING,
        start_id=reversal.START,
        stop_id=reversal.END,
    )
    return config, lambda share: Reversal(config, share)


class Reversal(LoaderTask[tjx_data.ReversalLoader]):
    """Writing strings of bytes backwards.

    Parameters
    ----------
    config : Config
        Resolved.
    share : Share
        This process's rows.
    """

    def __init__(self, config: Config, share: Share) -> None:
        open_split = functools.partial(tjx_data.ReversalLoader, max_length=config.data.seq_len)
        super().__init__(
            *both_splits(open_split, config.seed, share), eval_limit=config.train.eval_tokens
        )

    @property
    def introduction(self) -> str:
        """What the strings are."""
        return f"random strings of 1 to {self.train_data.max_length} bytes"

    def conclusion(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how many strings were written backwards without a mistake."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a byte",
            f"exact match      {metrics['exact_match']:.2%} of the strings, from start to end",
        ]
