"""Span corruption: denoising of plain text with an encoder-decoder."""

from collections.abc import Mapping
from typing import Any, Literal

import tjx_data
from tjx_core import ConfigError, Problem
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import TextTask
from tjx_trainer.tasks.special_tokens import with_special_tokens
from tjx_trainer.tasks.task import DataShard, OpenedTask
from tjx_trainer.tasks.text_data import TextData, count_tokens, make_token_loader, open_text


def open_span_corruption(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:
    """Open the text of an encoder-decoder; special tokens are those of the span loader.

    Raises
    ------
    tjx_data.HubError
        If a corpus or the tokenizer cannot be downloaded and is not cached.
    ValueError
        If the text cannot be used, or does not fit the model's vocabulary or sequence length.
    """
    text = open_text(config, progress)
    one_row = DataShard(batch_size=1, evaluation_batch_size=1, process_index=0, process_count=1)
    pairs = make_span_loader(config, text, one_row, "train")
    config = with_special_tokens(
        config,
        "the text with its spans",
        n_ids=pairs.n_ids,
        pad_id=pairs.pad_id,
        start_id=pairs.start_id,
        stop_id=pairs.end_id,
    )
    longest = max(pairs.source_len, pairs.target_len)
    if longest > config.model.max_seq_len:
        message = (
            f"got {config.model.max_seq_len}; expected at least {longest}, the rows of "
            f"data.seq_len={config.data.seq_len}; give --model.max_seq_len {longest} or another "
            "--data.seq_len"
        )
        raise ConfigError([Problem("model.max_seq_len", message, ("data.seq_len",))])
    return config, lambda share: SpanCorruptionTask(config, text, share)


def make_span_loader(
    config: Config, text: TextData, share: DataShard, split: Literal["train", "validation"]
) -> tjx_data.SpanLoader:
    """Return the loader of (corrupted text, removed spans) pairs of a split."""
    rows = make_token_loader(config, text, share, split)
    return tjx_data.SpanLoader(rows, vocab_size=text.tokenizer.vocab_size, seed=config.seed)


class SpanCorruptionTask(TextTask[tjx_data.SpanLoader]):
    """Generation of the spans removed from a text (Raffel et al. 2020, "T5", section 3.1.4).

    Parameters as for `TextTask`.
    """

    def __init__(self, config: Config, text: TextData, share: DataShard) -> None:
        super().__init__(config, text, share, make_span_loader)

    @property
    def data_summary(self) -> str:
        """Numbers of tokens and of removed spans."""
        pairs = self.train_data
        return (
            f"{count_tokens(pairs.loader):,} tokens to train on, "
            f"{count_tokens(self.validation_data.loader):,} held out; {pairs.n_sentinels} spans "
            f"removed from each {pairs.seq_len} tokens"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss and accuracy over the tokens of the spans."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a token of the spans",
            f"accuracy         {metrics['top1_accuracy']:.2%} of the tokens of the spans",
        ]
