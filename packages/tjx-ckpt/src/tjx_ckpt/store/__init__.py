"""Storage of checkpoints: folders and object stores, file formats, checksums and locks."""
