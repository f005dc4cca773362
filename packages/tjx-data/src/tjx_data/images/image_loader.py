"""Loader of normalized and augmented images.

Names of array axes: R rows, H height, W width, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Unpack

import numpy as np

from tjx_data.images.augmentation import NO_AUGMENTATION, Augmentation
from tjx_data.images.image_set import Images, Indices
from tjx_data.images.transforms import FloatImages, augment_images
from tjx_data.loading.base import IGNORED_LABEL, Batch, Batching, Loader, RowIndices
from tjx_data.loading.samplers import EpochSampler, derive_key

_PURPOSE = int.from_bytes(b"images")


class ImageLoader(Loader):
    """Rows of images with labels.

    Each epoch visits the images in its own order, a function of (seed, epoch), and batches continue
    across epochs without a gap. Pixels are normalized to (pixel / 255 - mean) / std per channel.

    Parameters
    ----------
    images : Images
        From `open_images`.
    split : {"train", "validation"}
        Split to read.
    mean, std : sequence of float, optional
        One number per channel, in units of pixel / 255. By default those of the training images,
        for both splits; large sets are sampled (`STATISTICS_BYTES`).
    augmentation : Augmentation
        Random changes of the images of `rows`, drawn anew in each epoch. `evaluation_batches` does
        not augment.
    **batching
        batch_size, seed, process_index and process_count, as of `Loader`.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """

    def __init__(
        self,
        images: Images,
        *,
        split: Literal["train", "validation"] = "train",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augmentation: Augmentation = NO_AUGMENTATION,
        **batching: Unpack[Batching],
    ) -> None:
        problems = []
        if split not in ("train", "validation"):
            problems.append(f"split: got {split!r}; expected train or validation")
        mean = images.train.statistics.mean if mean is None else mean
        std = images.train.statistics.std if std is None else std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.channels:
                problems.append(
                    f"{name}: got {list(values)}; expected {images.channels} numbers, one for each "
                    "channel"
                )
        if not all(value > 0 for value in std):
            problems.append(
                f"std: got {list(std)}; expected numbers above 0; a channel that is constant over "
                "the training images needs std="
            )
        super().__init__(problems=problems, **batching)
        self.images, self.split, self.augmentation = images, split, augmentation
        self.mean, self.std = tuple(mean), tuple(std)
        self._set = images.train if split == "train" else images.validation
        self._key = derive_key(self.seed, _PURPOSE)
        self._sampler = EpochSampler(self.n_images, self.seed)

    @property
    def n_images(self) -> int:
        """Number of images in the split."""
        return len(self._set.labels)

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the images, their order and their augmentation, by name."""
        return {
            "images": self._set.statistics.sha256,
            "split": self.split,
            "mean": " ".join(map(str, self.mean)),
            "std": " ".join(map(str, self.std)),
            "augmentation": str(self.augmentation),
            "seed": str(self.seed),
        }

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return augmented images by row index.

        Returns
        -------
        dict
            ``images`` float32 [R, H, W, C], normalized and augmented; ``labels`` int32 [R].
        """
        batch = self._read(self._sampler.offsets(row_indices))
        batch["images"] = augment_images(batch["images"], self.augmentation, self._key, row_indices)
        return batch

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield every image once, without augmentation, in batches of one shape.

        Parameters
        ----------
        limit : int, optional
            Most images to yield over all processes.

        Yields
        ------
        dict
            As `rows` returns; labels beyond the end are -100.
        """
        count = self.n_images if limit is None else min(limit, self.n_images)
        for first in range(0, count, self.batch_size):
            indices = first + self._local_rows
            batch = self._read(np.minimum(indices, count - 1))
            batch["labels"][indices >= count] = IGNORED_LABEL
            yield batch

    def _read(self, indices: Indices) -> Batch:
        mean, std = np.array(self.mean), np.array(self.std)
        # A pixel has one of 256 values: look up its normalized value.
        table_C256 = ((np.arange(256) / 255 - mean[:, None]) / std[:, None]).astype(np.float32)
        pixels = self._set.read(indices)
        images: FloatImages = table_C256[np.arange(len(mean)), pixels]
        return {"images": images, "labels": self._set.labels[indices]}
