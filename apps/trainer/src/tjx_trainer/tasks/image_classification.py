"""Image classification with a ViT."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tjx_data
from tjx_core import ConfigError, Problem
from tjx_data.images.image_set import Images
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import LoaderTask, make_loaders
from tjx_trainer.tasks.task import DataShard, OpenedTask


def open_image_classification(config: Config, _: tjx_data.Progress | None = None) -> OpenedTask:
    """Open an image data set; its size, channels and classes must fit the model.

    Raises
    ------
    ValueError
        If the files are missing or damaged, or do not fit the model.
    """
    model = config.model
    assert isinstance(model, ViTConfig)
    assert config.data.path is not None  # checked by the configuration
    images = tjx_data.open_images(config.data.path)
    problems = []
    if model.height_width != images.image_size:
        message = (
            f"got {model.height_width}; expected the {images.image_size} pixels of "
            f"{config.data.path}; give --model.image_size "
            f"{','.join(map(str, images.image_size))}, or --data.resize true"
        )
        problems.append(Problem("model.image_size", message))
    if model.channels != images.channels:
        message = (
            f"got {model.channels}; expected the {images.channels} of {config.data.path}; give "
            f"--model.channels {images.channels}"
        )
        problems.append(Problem("model.channels", message))
    if (model.n_classes or 0) < images.n_classes:
        message = (
            f"got {model.n_classes}; expected at least {images.n_classes}, the labels of "
            f"{config.data.path}; give --model.n_classes {images.n_classes}"
        )
        problems.append(Problem("model.n_classes", message))
    if problems:
        raise ConfigError(problems)
    return config, lambda share: ImageClassificationTask(config, images, share)


class ImageClassificationTask(LoaderTask[tjx_data.ImageLoader]):
    """Prediction of the class of an image.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    images : Images
        The image data set.
    share : DataShard
        The rows of this process.
    """

    def __init__(self, config: Config, images: Images, share: DataShard) -> None:
        assert config.data.path is not None
        super().__init__(
            *make_loaders(
                functools.partial(tjx_data.ImageLoader, images, augmentation=config.data.augment),
                config.seed,
                share,
            ),
            eval_limit=config.train.eval_tokens,
            folders={config.data.corpus: Path(config.data.path)},
        )

    @property
    def data_summary(self) -> str:
        """Numbers of training and test images."""
        return (
            f"{self.train_data.n_images:,} images to train on, "
            f"{self.validation_data.n_images:,} to test with"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return test loss and top-1 accuracy."""
        return [
            f"test loss        {metrics['loss']:.4f} nats an image",
            f"test accuracy    {metrics['top1_accuracy']:.2%}",
        ]
