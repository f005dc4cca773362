"""Images: telling what they show."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tjx_data
from tjx_data.images.image_set import Images
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.base_task import LoaderTask, make_loaders
from tjx_trainer.tasks.task import DataShard, OpenedTask


def open_image_classification(config: Config, _: tjx_data.Progress | None = None) -> OpenedTask:
    """Open a set of images; the model must be of their size and know their classes.

    Raises
    ------
    ValueError
        If the files are missing or damaged, or the model is for other images.
    """
    model = config.model
    assert isinstance(model, ViTConfig)
    assert config.data.path is not None  # the configuration's own check
    images = tjx_data.open_images(config.data.path)
    problems = []
    if model.height_width != images.image_size:
        problems.append(
            f"model.image_size is {model.height_width} and the images of {config.data.path} have "
            f"{images.image_size} pixels: give --model.image_size "
            f"{','.join(map(str, images.image_size))}, or --data.resize true"
        )
    if model.channels != images.channels:
        problems.append(
            f"model.channels is {model.channels} and the images of {config.data.path} have "
            f"{images.channels}: give --model.channels {images.channels}"
        )
    if model.n_classes < images.n_classes:
        problems.append(
            f"model.n_classes is {model.n_classes} and the labels of {config.data.path} are 0 to "
            f"{images.n_classes - 1}: give --model.n_classes {images.n_classes}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return config, lambda share: ImageClassificationTask(config, images, share)


class ImageClassificationTask(LoaderTask[tjx_data.ImageLoader]):
    """Telling the class of an image.

    Parameters
    ----------
    config : Config
        Resolved.
    images : Images
        The set.
    share : Share
        This process's rows.
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
        """How many images there are."""
        return (
            f"{self.train_data.n_images:,} images to train on, "
            f"{self.validation_data.n_images:,} to test with"
        )

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how many images were told right."""
        return [
            f"test loss        {metrics['loss']:.4f} nats an image",
            f"test accuracy    {metrics['top1_accuracy']:.2%}",
        ]
