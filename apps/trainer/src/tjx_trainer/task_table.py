"""Which task a run has: by the model's family, and for strings that are made up by the corpus."""

from collections.abc import Callable

import tjx_data
from tjx_trainer.config import Config, is_reversal
from tjx_trainer.image_task import open_image_classification
from tjx_trainer.masked_task import open_masked_language_modelling
from tjx_trainer.reversal_task import open_reversal
from tjx_trainer.span_task import open_span_corruption
from tjx_trainer.task import Opened
from tjx_trainer.text_task import open_language_modelling

_OPENERS: dict[str, Callable[..., Opened]] = {
    "gpt": open_language_modelling,
    "bert": open_masked_language_modelling,
    "vit": open_image_classification,
    "encoder_decoder": open_span_corruption,
}


def open_task(config: Config, progress: tjx_data.Progress | None = None) -> Opened:
    """Open the data of a run.

    Parameters
    ----------
    config : Config
        From the command line.
    progress : callable, optional
        Told how far preparing goes.

    Returns
    -------
    tuple
        The configuration with what the data decide (sizes of vocabulary and classes), and a
        function that makes the task.

    Raises
    ------
    tjx_data.HubError
        If the corpus or tokenizer is neither in the cache nor within reach.
    ValueError
        If the data cannot be used.
    """
    if is_reversal(config.data, config.model):
        return open_reversal(config, progress)
    return _OPENERS[config.model.family](config, progress)
