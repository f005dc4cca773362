"""Fetching a model from the Hugging Face hub: never a pickle, only what `load` reads."""

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = [
    "config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model",
]  # fmt: skip


def find(path_or_hub_name: str | Path, revision: str | None) -> Path:
    """Return the folder of a model: the path itself, or the hub's cache after a download.

    Raises
    ------
    ValueError
        If there is no such folder and it cannot be fetched either.
    """
    path, name = Path(path_or_hub_name), str(path_or_hub_name)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is a folder, which has no revision {revision!r}: leave it out"
            )
        return path
    if path.exists() or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name} is no folder, and no name on the Hugging Face hub such as owner/model"
        )
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"{name} is no folder here; to fetch it from the Hugging Face hub: "
            "pip install 'tjx-nn[hf]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED)
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here, is not in the hub's cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and the hub cannot be reached: give a "
            "folder with config.json and model.safetensors, or fetch it where there is a network"
        ) from error
    except HfHubHTTPError as error:
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(
            f"{name} is no folder here, and the hub does not give it{at}: {error}"
        ) from error
