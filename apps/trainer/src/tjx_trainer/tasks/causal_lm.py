"""Causal language modeling: next-token prediction with a GPT."""

import lzma
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import tjx_data
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.distillation.teacher import with_teacher
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.tasks.base_task import LoaderTask, TextTask
from tjx_trainer.tasks.sampling import generate_text, max_new_tokens_for
from tjx_trainer.tasks.task import DataShard, OpenedTask
from tjx_trainer.tasks.text_data import (
    Rows,
    TextData,
    count_tokens,
    fit_vocabulary,
    make_language_model_loader,
    open_text,
)
from tjx_trainer.tasks.token_files import load_token_tokenizer, make_file_loader
from tjx_trainer.training.pretrained import check_tokenizer


def open_causal_lm(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:
    """Open the text or token files of a decoder; the model's vocabulary is the tokenizer's."""
    if config.data.reads_tokens:
        tokenizer = load_token_tokenizer(config)
        if tokenizer is None:
            with_teacher(config, None)
            return config, lambda share: TokenFilesTask(config, share)
        text = TextData({}, tokenizer)
    else:
        text = open_text(config, progress)
    for note in check_tokenizer(config, text.tokenizer):
        log_info(f"note           {note}")
    config = fit_vocabulary(config, text.tokenizer.vocab_size)
    config = _with_usable_prompt(with_teacher(config, text.tokenizer), text.tokenizer)
    return config, lambda share: CausalLMTask(config, text, share)


def _with_usable_prompt(config: Config, tokenizer: tjx_data.Tokenizer) -> Config:
    """Remove a sample prompt that the tokenizer cannot encode, with a note to the user."""
    prompt = config.train.sample_prompt
    if not (prompt and config.train.sample_tokens):
        return config
    try:
        tokenizer.encode_prompt(prompt)
    except ValueError as error:
        log_info(f"note           samples start without train.sample_prompt {prompt!r}: {error}")
        return replace(config, train=replace(config.train, sample_prompt=None))
    return config


class CausalLMTask(TextTask[Rows]):
    """Next-token prediction.

    Parameters as for `TextTask`.
    """

    def __init__(self, config: Config, text: TextData, share: DataShard) -> None:
        super().__init__(config, text, share, make_language_model_loader)
        # Accuracies need all logits; the loss does not.
        self.accuracies = (1, 5, 10) if config.log.accuracies else ()
        self.token_byte_lengths = text.tokenizer.token_byte_lengths

    @property
    def data_summary(self) -> str:
        """Numbers of training and validation tokens, and the vocabulary size."""
        tokens = f"{count_tokens(self.train_data):,} tokens"
        if self.config.data.stream:
            tokens = f"a stream of {', '.join(self.config.data.weights)}"
        return (
            f"{tokens} to train on, "
            f"{count_tokens(self.validation_data):,} held out, "
            f"vocabulary {self.tokenizer.vocab_size:,}"
        )

    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss, perplexity and bits per byte, and a text sample."""
        xz = self._xz_bits_per_byte()
        compared = "" if xz is None else f" (`xz -9` needs {xz:.3f} for the same text)"
        lines = [
            f"validation loss  {metrics['loss']:.4f} nats a token, "
            f"perplexity {metrics['perplexity']:.2f}",
            f"bits per byte    {metrics['bits_per_byte']:.3f}{compared}",
        ]
        if (sample := self.sample(params)) is not None:
            lines = ["a sample", "--------", sample, "--------", *lines]
        return lines

    def sample(self, params: dict[str, Any], /) -> str | None:
        """Generate a continuation of ``train.sample_prompt``."""
        config, prompt = self.config, self.config.train.sample_prompt or ""
        if not config.train.sample_tokens:
            return None
        assert isinstance(config.model, GPTConfig)
        room = max_new_tokens_for(config.model, self.tokenizer, prompt)
        text = generate_text(
            config.model,
            params,
            self.tokenizer,
            prompt,
            max_new_tokens=min(config.train.sample_tokens, room),
            temperature=config.train.sample_temperature,
            top_k=config.train.sample_top_k,
            seed=config.seed,
        )
        return prompt + text[0]

    def _xz_bits_per_byte(self) -> float | None:
        """Return the size of the evaluated text under ``xz -9`` [bits/byte], as a baseline.

        None if the evaluated text is not contiguous. xz has not seen the training text.
        """
        loader, tokenizer = self.validation_data, self.tokenizer
        if not isinstance(loader, tjx_data.TokenLoader) or loader.packing != "windows":
            return None
        n_labels = min(loader.n_tokens - 1, self.config.train.eval_tokens or loader.n_tokens)
        tokens = loader.read(1, n_labels).tolist()
        text = tokenizer.decode([token for token in tokens if token != tokenizer.eot_id]).encode()
        return 8 * len(lzma.compress(text, preset=9)) / len(text)


class TokenFilesTask(LoaderTask[tjx_data.TokenLoader]):
    """Next-token prediction on token files without a tokenizer.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    share : DataShard
        The rows of this process.
    """

    def __init__(self, config: Config, share: DataShard) -> None:
        super().__init__(
            make_file_loader(config, share, "train", None),
            make_file_loader(config, share, "validation", None),
            eval_limit=config.train.eval_tokens,
        )
        # Lengths of 0: the perplexity of a token is known, its bytes are not.
        assert isinstance(config.model, GPTConfig)
        self.token_byte_lengths = np.zeros(config.model.vocab_size, np.int32)
        self.accuracies = (1, 5, 10) if config.log.accuracies else ()

    @property
    def data_summary(self) -> str:
        """Numbers of training and validation tokens."""
        return (
            f"{self.train_data.n_tokens:,} tokens to train on, "
            f"{self.validation_data.n_tokens:,} held out, no tokenizer"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss and perplexity."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a token, "
            f"perplexity {metrics['perplexity']:.2f}"
        ]
