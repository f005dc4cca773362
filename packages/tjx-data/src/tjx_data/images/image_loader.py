"""Batches of images, normalised, and changed a little for training.

Names of array axes: R rows, H height, W width, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from tjx_data.images.augmentation import NO_AUGMENTATION, Augmentation
from tjx_data.images.image_set import Images, Places
from tjx_data.images.transforms import FloatImages, augment_images
from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.loading.samplers import EpochSampler
from tjx_data.loading.stateless_rng import derive_key

_PURPOSE = int.from_bytes(b"images")


class ImageLoader(Loader):
    """Rows of images with labels.

    Each epoch visits the images in an order of its own, drawn from (seed, epoch), and batches go on
    from one epoch into the next. Pixels become (pixel / 255 - mean) / std of their channel.

    Parameters
    ----------
    images : Images
        From `open_images`.
    split : {"train", "validation"}
        Which part.
    batch_size, seed, process_index, process_count : int
        As of `Loader`.
    mean, std : sequence of float, optional
        A number for each channel, in the units of pixel / 255; by default what is measured over the
        training images, also for the held-out ones, so that those have about mean 0 and variance 1.
        Of large sets 256 MiB of pixels are measured.
    augmentation : Augmentation
        What is done to the images of `rows`, anew each time that one comes by; those of
        `evaluation_batches` stay as they are.

    Raises
    ------
    ValueError
        With a line for each argument that is wrong.
    """

    def __init__(
        self,
        images: Images,
        *,
        split: Literal["train", "validation"] = "train",
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        problems = []
        if split not in ("train", "validation"):
            problems.append(f"split={split!r} is unknown; choose train or validation")
        mean = images.train.statistics.mean if mean is None else mean
        std = images.train.statistics.std if std is None else std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.channels:
                problems.append(
                    f"{name}={list(values)}: the images have {images.channels} channels; give a "
                    "number for each"
                )
        if not all(value > 0 for value in std):
            problems.append(
                f"std={list(std)}: a channel is the same everywhere, or the number is wrong; give "
                "numbers above 0"
            )
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            problems=problems,
        )
        self.images, self.split, self.augmentation = images, split, augmentation
        self.mean, self.std = tuple(mean), tuple(std)
        self._set = images.train if split == "train" else images.validation
        self._key = derive_key(seed, _PURPOSE)
        self._order = EpochSampler(self.n_images, seed)

    @property
    def n_images(self) -> int:
        """Images in the split."""
        return len(self._set.labels)

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the images, their order and what is done to them."""
        return {
            "images": self._set.statistics.sha256,
            "split": self.split,
            "mean": " ".join(map(str, self.mean)),
            "std": " ".join(map(str, self.std)),
            "augmentation": str(self.augmentation),
            "seed": str(self.seed),
        }

    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns.

        Returns
        -------
        dict
            ``images`` float32 [R, H, W, C], normalised and augmented; ``labels`` int32 [R].
        """
        batch = self._gather(self._order.places(turns))
        batch["images"] = augment_images(batch["images"], self.augmentation, self._key, turns)
        return batch

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield every image once, as it is, in batches of one shape; labels beyond are -100.

        Parameters
        ----------
        limit : int, optional
            Stop after so many images (over all processes).
        """
        count = self.n_images if limit is None else min(limit, self.n_images)
        for first in range(0, count, self.batch_size):
            places = first + self._rows
            batch = self._gather(np.minimum(places, count - 1))
            batch["labels"][places >= count] = IGNORED_LABEL
            yield batch

    def _gather(self, places: Places) -> Batch:
        mean, std = np.array(self.mean), np.array(self.std)
        # A pixel has one of 256 values: what becomes of each is looked up.
        table_C256 = ((np.arange(256) / 255 - mean[:, None]) / std[:, None]).astype(np.float32)
        pixels = self._set.read(places)
        images: FloatImages = table_C256[np.arange(len(mean)), pixels]
        return {"images": images, "labels": self._set.labels[places]}
