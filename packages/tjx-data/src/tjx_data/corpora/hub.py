"""The only code that talks to the network: the Hugging Face hub, and plain downloads.

The hub's own libraries retry for 20 seconds and more before they admit that there is no network.
Here one quick question comes first; where it is not answered they are told to work from their
cache alone, so that an answer comes within seconds.
"""

import hashlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tjx_data.atomic import write_atomically
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.licences import show_licence
from tjx_data.suggest import did_you_mean

PROBE_SECONDS = 4.0
MAX_DOWNLOAD_BYTES = 256 << 20  # bytes of a plain file, which is held in memory
TOKENIZER_KINDS = ("bpe", "char", "byte", "gpt2", "auto")
_TRUE = ("1", "ON", "YES", "TRUE")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

CORPUS_ALTERNATIVES = (
    "Ways on: --data.corpus python-docs (carried by Python itself, no network), or "
    "--data.path FILE_OR_GLOB (text, JSON lines or Parquet of your own)"
)
TOKENIZER_ALTERNATIVES = (
    "Ways on: --data.tokenizer bpe (learnt from your corpus), or --data.tokenizer FILE_OR_FOLDER "
    "(a tokenizer.json, or GPT-2's encoder.json and vocab.bpe)"
)


class HubError(ConnectionError, ValueError):
    """What was asked for is not in the cache, and its place on the network is out of reach."""


def endpoint() -> str:
    """Return the hub's address, ``$HF_ENDPOINT`` where that is set."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline_by_choice() -> bool:
    """Tell whether the environment forbids the network (``HF_HUB_OFFLINE`` and its kin)."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in _OFFLINE_VARIABLES)


def reachable(url: str) -> bool:
    """Tell within `PROBE_SECONDS` whether anything answers at an address; proxies are used."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310  our own https address
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):  # noqa: S310  as above
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
            error.close()
        except OSError:
            answers.append(False)

    # Looking up a name has no time limit of its own: wait for a thread, not for the resolver.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def _why_unreachable(url: str) -> str | None:
    if offline_by_choice():
        return "HF_HUB_OFFLINE forbids the network"
    return None if reachable(url) else f"{url} cannot be reached"


@contextmanager
def _from_cache_only(switch_on: bool) -> Iterator[None]:
    """Tell both Hugging Face libraries not to try the network; they have no argument for it."""
    import datasets.config
    import huggingface_hub.constants

    modules: Sequence[Any] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value or switch_on
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def load_rows(
    name: str,
    repo: str,
    config: str | None,
    split: str,
    *,
    revision: str | None,
    streamed: bool,
    licence: str,
) -> Any:
    """Open one split of a dataset on the hub, or of a local folder in its format.

    Parameters
    ----------
    name : str
        What the corpus is called here, for the error.
    repo, config, split : str
        What it is called on the hub.
    revision : str or None
        The commit that is read, and no other; None for a local folder.
    streamed : bool
        Whether rows are fetched as they are read and nothing is kept. Where the hub is out of
        reach they are read from the cache, if another program left them there.
    licence : str
        Shown before the first download.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        Its rows.

    Raises
    ------
    HubError
        If it is neither in the cache nor within reach.
    ValueError
        If the ``hub`` extra is not installed.
    """
    try:
        import datasets.load
    except ImportError as error:
        raise ValueError(
            f"corpus {name!r} comes from the Hugging Face hub, which needs the extra: "
            f"pip install 'tjx-data[hub]'. {CORPUS_ALTERNATIVES}"
        ) from error
    is_folder = Path(repo).is_dir()
    assert is_folder or revision is not None
    problem = None if is_folder else _why_unreachable(endpoint())
    if problem is None:
        show_licence(name, licence, repo if is_folder else f"{endpoint()}/datasets/{repo}")
    try:
        with _from_cache_only(problem is not None):
            builder = datasets.load.load_dataset_builder(repo, config, revision=revision)
            # The library takes any revision in the cache where it cannot have the right one.
            if revision is not None and builder.hash != revision:
                raise HubError(f"{repo}: found revision {builder.hash} in place of {revision}")
            if streamed:
                return builder.as_streaming_dataset(split=split)
            builder.download_and_prepare()
            return builder.as_dataset(split=split)
    except Exception as error:
        if problem is None:
            raise
        raise HubError(
            f"corpus {name!r} ({repo} on the Hugging Face hub, revision {revision}) is not in the "
            f"cache {datasets.config.HF_DATASETS_CACHE}, and {problem}. {CORPUS_ALTERNATIVES}"
        ) from error


def read_texts(name: str, repo: str, rows: Any, field: str) -> Iterator[str | Malformed]:
    """Yield the text of each row.

    Parameters
    ----------
    name, repo : str
        What the corpus is called, here and on the hub.
    rows : datasets.Dataset or datasets.IterableDataset
        Its rows.
    field : str
        Where the text is in a row.

    Raises
    ------
    HubError
        If the hub stops to answer in the middle of a stream.
    """
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            text = row[field]
            if isinstance(text, str):
                yield text
            else:
                what = "null" if text is None else f"a {type(text).__name__}"
                yield Malformed(repo, number, f"field {field!r} holds {what}, not a string")
    except OSError as error:
        raise HubError(
            f"corpus {name!r} ({repo}): reading stopped after {number} rows: {error}. Start again "
            "when the network is back"
        ) from error


def download_tokenizer(name: str, repos: Sequence[str]) -> Path:
    """Return the path of a hub tokenizer's ``tokenizer.json``, from the cache if it is there.

    Parameters
    ----------
    name : str
        What the user called it, for the error.
    repos : Sequence[str]
        Its names on the hub; the first is downloaded.

    Raises
    ------
    HubError
        If it is neither in the cache nor within reach.
    ValueError
        If the ``hub`` extra is not installed, or the hub has no such tokenizer.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"tokenizer {name!r} comes from the Hugging Face hub, which needs the extra: "
            f"pip install 'tjx-data[hub]'. {TOKENIZER_ALTERNATIVES}"
        ) from error
    for repo in repos:
        try:
            cached = huggingface_hub.hf_hub_download(repo, "tokenizer.json", local_files_only=True)
            return Path(cached)
        except LocalEntryNotFoundError:
            continue
    if problem := _why_unreachable(endpoint()):
        hint = "" if name in TOKENIZER_KINDS else did_you_mean(name, TOKENIZER_KINDS)
        raise HubError(
            f"tokenizer={name!r} is no file or folder here, is not in the hub's cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and {problem}"
            f"{hint or '.'} {TOKENIZER_ALTERNATIVES}"
        )
    try:
        return Path(huggingface_hub.hf_hub_download(repos[0], "tokenizer.json"))
    except HfHubHTTPError as error:
        raise ValueError(
            f"tokenizer={name!r} is no file or folder here, and {endpoint()}/{repos[0]} has no "
            f"tokenizer.json to read: {error}. {TOKENIZER_ALTERNATIVES}"
        ) from error


def download(name: str, url: str, sha256: str, file: Path, *, licence: str) -> Path:
    """Fetch a file once and check what it holds.

    Parameters
    ----------
    name : str
        What the corpus is called, for the error.
    url, sha256 : str
        Its address, and the hash that its content must have.
    file : Path
        Where to keep it; a file with the right hash is used as it is.
    licence : str
        Shown before the first download.

    Raises
    ------
    HubError
        If it has not been fetched before and cannot be now.
    ValueError
        If what arrives is something else.
    """
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
        return file
    error_start = f"corpus {name!r} ({url}) is not in the cache {file.parent}, and"
    if problem := _why_unreachable(url):
        raise HubError(f"{error_start} {problem}. {CORPUS_ALTERNATIVES}")
    show_licence(name, licence, url)
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  our own address
            content = answer.read(MAX_DOWNLOAD_BYTES + 1)
    except OSError as error:
        raise HubError(
            f"{error_start} fetching it failed: {error}. {CORPUS_ALTERNATIVES}"
        ) from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(
            f"{url} holds more than {MAX_DOWNLOAD_BYTES} bytes: it was changed. Not used"
        )
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{url} holds SHA-256 {found}, not {sha256}: it was changed. Not used")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return file
