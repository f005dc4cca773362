"""Vocabulary and special tokens of an encoder-decoder, taken from its data."""

from dataclasses import replace

from tjx_core import ConfigError, Problem
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_trainer.config.run_config import Config


def with_special_tokens(
    config: Config, what: str, *, n_ids: int, pad_id: int, start_id: int, stop_id: int
) -> Config:
    """Return the configuration with the vocabulary size and special tokens of the data.

    Parameters
    ----------
    config : Config
        Configuration of an encoder-decoder.
    what : str
        Name of the data in error messages.
    n_ids : int
        Source and target ids are 0 to n_ids - 1.
    pad_id, start_id, stop_id : int
        Ids of the special tokens.

    Raises
    ------
    ValueError
        If the model has other special tokens, or too small a vocabulary.
    """
    model, default = config.model, EncoderDecoderConfig()
    assert isinstance(model, EncoderDecoderConfig)
    special = {"pad_id": pad_id, "start_id": start_id, "stop_id": stop_id}
    problems = [
        Problem(
            f"model.{name}",
            f"got {getattr(model, name)}; expected {value}, that of {what}; leave it out",
        )
        for name, value in special.items()
        if getattr(model, name) not in (value, getattr(default, name))
    ]
    vocab_size = n_ids if config.train.vocab_from_tokenizer else model.vocab_size
    sizes = {"vocab_size": vocab_size, "source_vocab_size": model.source_vocab_size}
    problems += [
        Problem(
            f"model.{name}", f"got {size}; expected at least {n_ids}, that of {what}; leave it out"
        )
        for name, size in sizes.items()
        if size is not None and size < n_ids
    ]
    if problems:
        raise ConfigError(problems)
    fitted = replace(
        model,
        vocab_size=vocab_size,
        pad_id=pad_id,
        start_id=start_id,
        stop_id=stop_id,
    )
    return replace(config, model=fitted)
