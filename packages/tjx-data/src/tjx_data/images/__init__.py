"""Labeled images: file formats, pixel statistics, augmentation and the image loader."""
