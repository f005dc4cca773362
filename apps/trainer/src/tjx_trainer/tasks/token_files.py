"""The user's own files of token ids: their tokenizer and their loader."""

from typing import Literal

import tjx_data
from tjx_core import ConfigError, Problem
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.tasks.task import DataShard


def load_token_tokenizer(config: Config) -> tjx_data.Tokenizer | None:
    """Return the tokenizer that made the tokens, or None if only the vocabulary size is given.

    Raises
    ------
    ConfigError
        If neither ``data.tokenizer`` nor ``model.vocab_size`` is given.
    tjx_data.HubError
        If the tokenizer cannot be downloaded and is not cached.
    """
    kind = config.data.tokenizer
    if kind == "byte":
        return tjx_data.byte_tokenizer()
    if kind not in ("bpe", "auto"):
        return tjx_data.Tokenizer.load(kind)
    if config.train.vocab_from_tokenizer:
        files = tjx_data.find_token_files(config.data)
        assert files is not None
        largest = max(tjx_data.largest_id(file, config.data.id_dtype) for file in files if file)
        message = (
            f"got none; expected the vocabulary of {config.data.path}, whose largest id is "
            f"{largest}; give --data.tokenizer, or --model.vocab_size {largest + 1} or more"
        )
        raise ConfigError([Problem("model.vocab_size", message, ("data.tokenizer",))])
    assert isinstance(config.model, GPTConfig)
    log_info(
        f"note           no tokenizer: {config.model.vocab_size:,} ids by model.vocab_size, no "
        "text samples and no bits per byte; give --data.tokenizer for both"
    )
    return None


def make_file_loader(
    config: Config,
    share: DataShard,
    split: Literal["train", "validation"],
    tokenizer: tjx_data.Tokenizer | None,
) -> tjx_data.TokenLoader:
    """Return the loader of a split of the token files that ``data.path`` names.

    Raises
    ------
    ValueError
        If a file is damaged, or has ids beyond the vocabulary.
    """
    files = tjx_data.find_token_files(config.data)
    assert files is not None
    assert isinstance(config.model, GPTConfig)
    vocab_size = config.model.vocab_size if tokenizer is None else tokenizer.vocab_size
    return tjx_data.TokenLoader(
        tjx_data.open_token_split(config.data, files, split, vocab_size=vocab_size),
        seq_len=config.data.seq_len,
        batch_size=share.batch_size if split == "train" else share.evaluation_batch_size,
        seed=config.seed,
        windows=config.data.windows,
        process_index=share.process_index,
        process_count=share.process_count,
    )
