"""Download of models from the Hugging Face hub, without pickle files."""

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = [
    "config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model",
]  # fmt: skip


def find(path_or_hub_name: str | Path, revision: str | None) -> Path:
    """Resolve a path or a hub name to a local folder, downloading the model if necessary.

    Raises
    ------
    ValueError
        If the folder does not exist and cannot be downloaded.
    """
    path, name = Path(path_or_hub_name), str(path_or_hub_name)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision: got {revision!r} for the local folder {name}; expected None; omit it"
            )
        return path
    if path.exists() or not _NAME.fullmatch(name):
        raise ValueError(
            f"path_or_hub_name: got {name}; expected a folder, or a name on the Hugging Face hub "
            "such as owner/model"
        )
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"path_or_hub_name: got {name}, which is not a local folder; downloading from the "
            "Hugging Face hub requires pip install 'tjx-nn[hf]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED)
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"path_or_hub_name: got {name}, which is not a local folder and not in the hub cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and the hub cannot be reached; expected a "
            "folder with config.json and model.safetensors, or a network connection"
        ) from error
    except HfHubHTTPError as error:
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(
            f"path_or_hub_name: got {name}, which is not a local folder, and the hub returned an "
            f"error{at}: {error}"
        ) from error
