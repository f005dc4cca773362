"""Task registry: opens the task of a run by its name, or by model family and corpus."""

from collections.abc import Callable

import tjx_data
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.task_checks import RL_TASKS, is_byte_reversal
from tjx_trainer.extensions import registered_tasks
from tjx_trainer.tasks.byte_reversal import open_reversal
from tjx_trainer.tasks.causal_lm import open_causal_lm
from tjx_trainer.tasks.image_classification import open_image_classification
from tjx_trainer.tasks.masked_lm import open_masked_lm
from tjx_trainer.tasks.sft import open_sft
from tjx_trainer.tasks.span_corruption import open_span_corruption
from tjx_trainer.tasks.task import OpenedTask

_OPENERS: dict[type, Callable[..., OpenedTask]] = {
    GPTConfig: open_causal_lm,
    BertConfig: open_masked_lm,
    ViTConfig: open_image_classification,
    EncoderDecoderConfig: open_span_corruption,
}


def open_task(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:
    """Open the data of a run.

    Parameters
    ----------
    config : Config
        From the command line.
    progress : callable, optional
        Receives the progress of data preparation.

    Returns
    -------
    tuple
        The configuration with values that depend on the data (vocabulary size, special tokens), and
        a function from `DataShard` to the task.

    Raises
    ------
    tjx_data.HubError
        If the corpus or tokenizer cannot be downloaded and is not cached.
    ValueError
        If the data do not fit the configuration.
    """
    if config.task in RL_TASKS:
        from tjx_trainer.rl.open_rl import open_rl

        return open_rl(config)
    if config.task == "sft":
        return open_sft(config, progress)
    if config.task is not None:
        opened: OpenedTask = registered_tasks[config.task](config, progress)
        return opened
    if is_byte_reversal(config.data, config.model):
        return open_reversal(config, progress)
    open_family = next(each for kind, each in _OPENERS.items() if isinstance(config.model, kind))
    return open_family(config, progress)
