"""Images: telling what they show."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

import tjx_data
from tjx_nn.vit_config import ViTConfig
from tjx_trainer.config import Config
from tjx_trainer.run_dir import RunDirectory
from tjx_trainer.step import Batch
from tjx_trainer.task import Opened, Put, Share


def open_image_classification(config: Config, _: tjx_data.Progress | None = None) -> Opened:
    """Open a folder of images; the model's image size is theirs.

    Raises
    ------
    ValueError
        If the files are missing or damaged, or of another size than the model's.
    """
    model = config.model
    assert isinstance(model, ViTConfig)
    assert config.data.path is not None  # the configuration's own check
    images = tjx_data.ImageLoader(config.data.path, batch_size=1)
    if model.height_width != images.image_size:
        raise ValueError(
            f"model.image_size is {model.height_width} and the images of {config.data.path} have "
            f"{images.image_size} pixels: give --model.image_size "
            f"{','.join(map(str, images.image_size))}"
        )
    return config, lambda share: ImageClassification(config, share)


class ImageClassification:
    """Telling the class of an image.

    Parameters
    ----------
    config : Config
        Resolved.
    share : Share
        This process's rows.
    """

    accuracies: tuple[int, ...] = (1,)
    token_byte_lengths: np.ndarray | None = None

    def __init__(self, config: Config, share: Share) -> None:
        self.config = config

        def loader(split: Literal["train", "validation"], batch_size: int) -> tjx_data.ImageLoader:
            assert config.data.path is not None
            return tjx_data.ImageLoader(
                config.data.path,
                split=split,
                batch_size=batch_size,
                seed=config.seed,
                process_index=share.process_index,
                process_count=share.process_count,
            )

        self.train_data = loader("train", share.batch_size)
        self.validation_data = loader("validation", share.evaluation_batch_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint of this run goes with."""
        return {"data": self.train_data.fingerprint}

    @property
    def introduction(self) -> str:
        """How many images there are."""
        return (
            f"{self.train_data.n_images:,} images to train on, "
            f"{self.validation_data.n_images:,} to test with"
        )

    def batch(self, step: int, put: Put) -> Batch:
        """Return the batch of a step."""
        return put(self.train_data.batch(step))

    def evaluation_batches(self, put: Put) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the test images."""
        for batch in self.validation_data.evaluation_batches(self.config.train.eval_tokens):
            yield put(batch), batch["labels"]

    def record(self, run: RunDirectory) -> None:
        """Keep where the images lie."""
        run.point_to_data(self.train_data.directory, fingerprint=self.fingerprints["data"])

    def conclusion(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how many images were told right."""
        return [
            f"test loss        {metrics['loss']:.4f} nats an image",
            f"test accuracy    {metrics['top1_accuracy']:.2%}",
        ]
