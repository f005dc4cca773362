"""Masked language modeling with BERT."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import TextTask
from tjx_trainer.tasks.task import DataShard, OpenedTask
from tjx_trainer.tasks.text_data import (
    TextData,
    count_tokens,
    fit_vocabulary,
    make_token_loader,
    open_text,
)


def open_masked_lm(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:
    """Open the text of an encoder; the vocabulary is the tokenizer's and a mask token."""
    text = open_text(config, progress)
    config = fit_vocabulary(config, text.tokenizer.vocab_size + 1)
    return config, lambda share: MaskedLMTask(config, text, share)


def make_masked_loader(
    config: Config, text: TextData, share: DataShard, split: Literal["train", "validation"]
) -> tjx_data.MaskedLoader:
    """Return the loader of masked rows of a split."""
    tokenizer = text.tokenizer
    return tjx_data.MaskedLoader(
        make_token_loader(config, text, share, split),
        mask_id=tokenizer.vocab_size,
        vocab_size=tokenizer.vocab_size + 1,
        special_ids=tuple(tokenizer.special_tokens.values()),
        whole_words=np.append(tokenizer.starts_word, True) if config.data.whole_words else None,
        seed=config.seed,
    )


class MaskedLMTask(TextTask[tjx_data.MaskedLoader]):
    """Prediction of masked tokens (Devlin et al. 2018, "BERT", section 3.1).

    Parameters as for `TextTask`.
    """

    def __init__(self, config: Config, text: TextData, share: DataShard) -> None:
        super().__init__(config, text, share, make_masked_loader)

    @property
    def data_summary(self) -> str:
        """Numbers of training and validation tokens, and the vocabulary size."""
        return (
            f"{count_tokens(self.train_data.loader):,} tokens to train on, "
            f"{count_tokens(self.validation_data.loader):,} held out, "
            f"vocabulary {self.tokenizer.vocab_size:,} and the mask"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss and accuracy over the masked tokens."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a masked token",
            f"accuracy         {metrics['top1_accuracy']:.2%} of the masked tokens",
        ]
