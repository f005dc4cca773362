"""Opening of labeled image sets from a folder or the Hugging Face hub."""

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
    """Open a set of labeled images.

    Parameters
    ----------
    source : str or Path
        A folder with MNIST's four files (train-images-idx3-ubyte, train-labels-idx1-ubyte and those
        of t10k, each gzipped or not), which are read into memory. With the extra ``images`` also a
        folder that `datasets` saved, a folder of images per class (train/cat/1.png, ...), Parquet
        files, or a name on the Hugging Face hub with its commit, NAME@COMMIT.
    image_size : tuple of int, optional
        Height and width to which images are scaled and center-cropped. By default all images must
        have the size of the first one. Not supported for MNIST's files.
    image_column, label_column : str, optional
        Columns of a `datasets` set. Required if several columns hold images or class labels, or if
        labels are plain integers in a column not named ``label``.

    Returns
    -------
    Images
        Training split, and validation split or, without one, test split. Images have 1 channel if
        the first one is grayscale, else 3.

    Raises
    ------
    HubError
        If a hub repository is neither in the cache nor reachable.
    ValueError
        If a file is missing or damaged, the extra is not installed, or the set holds no images.
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
            f"image_size: got {image_size}; expected {images.image_size}, since MNIST's files are "
            "not resized; leave it out"
        )
    return images
