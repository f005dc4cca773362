"""Prepared text of a run, and loaders of its rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import tjx_data
from tjx_data.corpora.documents import SplitName
from tjx_data.transforms.transformed_loader import TransformedLoader
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.tasks.task import DataShard
from tjx_trainer.tasks.token_files import make_file_loader

PreparedRows = tjx_data.TokenLoader | tjx_data.MixtureLoader
Rows = PreparedRows | tjx_data.StreamRows


class TextData(NamedTuple):
    """Prepared text: a folder per corpus, and the tokenizer of all of them.

    Files of token ids have no folders.
    """

    folders: dict[str, Path]
    tokenizer: tjx_data.Tokenizer


def open_text(config: Config, progress: tjx_data.Progress | None = None) -> TextData:
    """Return the prepared text, of a stream its start; prepare it first if necessary.

    Raises
    ------
    tjx_data.HubError
        If a corpus or the tokenizer cannot be downloaded and is not cached.
    ValueError
        If the text cannot be used or is damaged.
    """
    data = config.data.stream_sample if config.data.stream else config.data
    folders = tjx_data.open_sets(data, progress=progress)
    if config.data.verify:
        for folder in folders.values():
            tjx_data.verify(folder)
    return TextData(folders, tjx_data.Tokenizer.load(next(iter(folders.values()))))


def fit_vocabulary(config: Config, n_ids: int) -> Config:
    """Return `config.with_vocabulary(n_ids)`; warn if the model has ids without a token."""
    config = config.with_vocabulary(n_ids)
    model = config.model
    assert isinstance(model, GPTConfig | BertConfig)
    if model.tokenizer_size is not None and model.tokenizer_size < model.vocab_size:
        log_info(
            f"warning        model.vocab_size {model.vocab_size:,} is larger than the tokenizer's "
            f"{n_ids:,} ids: the extra ids are masked in loss and samples; leave out "
            "--model.vocab_size to use the tokenizer's"
        )
    return config


def make_token_loader(
    config: Config, text: TextData, share: DataShard, split: Literal["train", "validation"]
) -> PreparedRows:
    """Return the loader of a split: of one corpus, or of a weighted mixture.

    Raises
    ------
    ValueError
        If a corpus is damaged or shorter than a row, or too small for ``data.max_epochs``.
    """
    if config.data.reads_tokens:
        return make_file_loader(config, share, split, text.tokenizer)
    batch_size = share.batch_size if split == "train" else share.evaluation_batch_size

    def one(folder: Path, split: SplitName, **processes: int) -> tjx_data.TokenLoader:
        return tjx_data.TokenLoader(
            folder,
            split=split,
            seq_len=config.data.seq_len,
            batch_size=batch_size,
            seed=config.seed,
            packing=config.data.packing,
            windows=config.data.windows,
            tokenizer=text.tokenizer,
            **processes,
        )

    processes = {"process_index": share.process_index, "process_count": share.process_count}
    if config.data.mixture is None:
        (folder,) = text.folders.values()
        return one(folder, split, **processes)
    loaders = {name: one(folder, split) for name, folder in text.folders.items()}
    by_step: Mapping[int, Mapping[str, float]] = config.data.weights_by_step
    if config.data.mixture_temperature is not None or config.data.max_epochs is not None:
        by_step = _weigh(config, {name: one(each, "train") for name, each in text.folders.items()})
    return tjx_data.MixtureLoader(
        loaders,
        by_step[0],
        changes={step: weights for step, weights in by_step.items() if step},
        batch_size=batch_size,
        **processes,
    )


def _weigh(
    config: Config, loaders: Mapping[str, tjx_data.TokenLoader]
) -> Mapping[int, Mapping[str, float]]:
    """Return the weights of a mixture by step, from the sizes of its training splits."""
    data, by_step = config.data, config.data.weights_by_step
    if data.mixture_temperature is not None:
        sizes = {name: loader.n_tokens for name, loader in loaders.items()}
        by_step = {0: tjx_data.temperature_weights(sizes, data.mixture_temperature)}
    if data.max_epochs is None:
        return by_step
    return tjx_data.limit_epochs(
        by_step,
        {name: loader.rows_per_epoch for name, loader in loaders.items()},
        n_steps=config.train.max_steps,
        batch_size=config.train.batch_size,
        max_epochs=data.max_epochs,
    )


def format_mixture(rows: tjx_data.Loader, config: Config) -> str | None:
    """Return the share and the epochs of each corpus of a mixture in a run; else None."""
    mixture = rows.loader if isinstance(rows, TransformedLoader) else rows
    if not isinstance(mixture, tjx_data.MixtureLoader):
        return None
    n_rows = config.train.max_steps * mixture.batch_size
    epochs = mixture.epochs_by_corpus(n_rows)
    found = []
    for name, count in mixture.rows_by_corpus(n_rows).items():
        repeated = f" ({epochs[name]:.2f} epochs)" if name in epochs else ""
        found.append(f"{name} {count / n_rows:.1%}{repeated}")
    return ", ".join(found)


def make_language_model_loader(
    config: Config, text: TextData, share: DataShard, split: Literal["train", "validation"]
) -> Rows:
    """Return the loader of a split; with ``data.stream`` training text is tokenized on access.

    Raises
    ------
    ValueError
        As `make_token_loader`.
    """
    if config.data.stream and split == "train":
        return tjx_data.open_stream(
            config.data,
            text.tokenizer,
            batch_size=share.batch_size,
            seed=config.seed,
            process_index=share.process_index,
            process_count=share.process_count,
        )
    return make_token_loader(config, text, share, split)


def count_tokens(rows: Rows) -> int:
    """Return the number of tokens of all corpora that a loader reads; 0 for streams."""
    loaders = rows.loaders.values() if isinstance(rows, tjx_data.MixtureLoader) else [rows]
    return sum(loader.n_tokens for loader in loaders if isinstance(loader, tjx_data.TokenLoader))
