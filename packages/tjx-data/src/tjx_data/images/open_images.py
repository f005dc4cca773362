"""From a folder, or a name on the hub, to a set of images."""

from pathlib import Path

from tjx_data.images.hf_datasets import open_dataset
from tjx_data.images.image_set import Images
from tjx_data.images.mnist import is_mnist_folder, open_mnist


def open_images(
    source: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """Open a set of images with labels.

    Parameters
    ----------
    source : str or Path
        A folder with MNIST's four files (train-images-idx3-ubyte, train-labels-idx1-ubyte and the
        same of t10k, each gzipped or not), read into memory; or one that the extra ``images``
        reads: as `datasets` saves a set to disk, a folder of images a class (train/cat/1.png, ...),
        or Parquet files; or a name on the Hugging Face hub with its commit, NAME@COMMIT.
    image_size : tuple of int, optional
        Height and width that images are scaled to, what stands out on two sides cut off; by default
        all must have the size of the first. MNIST's files keep theirs.
    image_column, label_column : str, optional
        Where images and labels are in the rows of a `datasets` set; needed where several columns
        hold such, or the labels are neither of classes nor in the column ``label``.

    Returns
    -------
    Images
        The splits; held out are the validation images, or the test images where there are none.
        Images have 1 channel where the first one is grey, else 3.

    Raises
    ------
    HubError
        If a name on the hub is neither in the cache nor within reach.
    ValueError
        If a file is missing or damaged, the extra is not installed, or the set is none of images.
    """
    folder = Path(source).expanduser()
    if not is_mnist_folder(folder):
        return open_dataset(
            str(source),
            image_size=image_size,
            image_column=image_column,
            label_column=label_column,
        )
    images = open_mnist(folder)
    if image_size not in (None, images.image_size):
        raise ValueError(
            f"image_size={image_size}: images in MNIST's files keep their size, "
            f"{images.image_size} pixels; leave it out"
        )
    return images
