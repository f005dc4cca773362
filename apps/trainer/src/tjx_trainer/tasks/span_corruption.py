"""Text with gaps and what belongs there: how an encoder-decoder learns from plain text."""

from collections.abc import Mapping
from typing import Any, Literal

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import TextTask
from tjx_trainer.tasks.special_tokens import with_special_tokens
from tjx_trainer.tasks.task import DataShard, OpenedTask
from tjx_trainer.tasks.text_data import TextData, count_tokens, make_token_loader, open_text


def open_span_corruption(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:
    """Open the text of an encoder-decoder; its ids are the tokenizer's and the spans'.

    Raises
    ------
    tjx_data.HubError
        If a corpus or the tokenizer is neither in the cache nor within reach.
    ValueError
        If the text cannot be used, or the model is for other tokens or shorter rows.
    """
    text = open_text(config, progress)
    alone = DataShard(batch_size=1, evaluation_batch_size=1, process_index=0, process_count=1)
    pairs = make_span_loader(config, text, alone, "train")
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
        raise ValueError(
            f"model.max_seq_len is {config.model.max_seq_len} and data.seq_len "
            f"{config.data.seq_len} makes rows of {longest}: give --model.max_seq_len {longest} or "
            "another --data.seq_len"
        )
    return config, lambda share: SpanCorruptionTask(config, text, share)


def make_span_loader(
    config: Config, text: TextData, share: DataShard, split: Literal["train", "validation"]
) -> tjx_data.SpanLoader:
    """Return the loader of a split's pairs."""
    rows = make_token_loader(config, text, share, split)
    return tjx_data.SpanLoader(rows, vocab_size=text.tokenizer.vocab_size, seed=config.seed)


class SpanCorruptionTask(TextTask[tjx_data.SpanLoader]):
    """Writing the spans that a text has lost (Raffel et al. 2020, "T5", section 3.1.4).

    Parameters
    ----------
    config : Config
        Resolved.
    text : Text
        What loses them.
    share : Share
        This process's rows.
    """

    def __init__(self, config: Config, text: TextData, share: DataShard) -> None:
        super().__init__(config, text, share, make_span_loader)

    @property
    def data_summary(self) -> str:
        """How much text there is, and what it loses."""
        pairs = self.train_data
        return (
            f"{count_tokens(pairs.loader):,} tokens to train on, "
            f"{count_tokens(self.validation_data.loader):,} held out; {pairs.n_sentinels} spans of "
            f"{pairs.seq_len} tokens are to be written"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how well the spans were predicted."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a token of the spans",
            f"accuracy         {metrics['top1_accuracy']:.2%} of the tokens of the spans",
        ]
