"""Network access: the Hugging Face hub, and downloads of files at fixed addresses.

The hub's libraries retry for 20 seconds and more without a network. Here one short request tests
the connection first; without an answer, the libraries are restricted to their cache, so that an
error is raised within seconds.
"""

import hashlib
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tjx_core import did_you_mean, write_atomically
from tjx_data.cache import default_cache_dir
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.text_template import record_text

PROBE_SECONDS = 4.0
MAX_DOWNLOAD_BYTES = 256 << 20
"""Largest plain file that is downloaded; it is held in memory."""
TOKENIZER_KINDS = ("bpe", "char", "byte", "gpt2", "auto")
_TRUE = ("1", "ON", "YES", "TRUE")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_log = logging.getLogger(__name__)

CORPUS_ALTERNATIVES = (
    "Alternatives: --data.corpus python-docs (part of Python, no network), or --data.path "
    "FILE_OR_GLOB (local text, JSON lines or Parquet)"
)
TOKENIZER_ALTERNATIVES = (
    "Alternatives: --data.tokenizer bpe (trained on your corpus), or --data.tokenizer "
    "FILE_OR_FOLDER (a tokenizer.json, or GPT-2's encoder.json and vocab.bpe)"
)


class HubError(ConnectionError, ValueError):
    """A corpus or tokenizer is not in the cache, and its server is unreachable."""


def endpoint() -> str:
    """Return the hub's address: ``$HF_ENDPOINT``, or the public hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Return whether the environment forbids network access (``HF_HUB_OFFLINE`` and similar)."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in _OFFLINE_VARIABLES)


def reachable(url: str) -> bool:
    """Return whether a server answers at an address within `PROBE_SECONDS`, also by proxy."""
    answers: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310  our own https address
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):  # noqa: S310  as above
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
            error.close()
        except OSError:
            answers.append(False)

    # Name resolution has no timeout of its own: wait for a thread instead.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def _why_unreachable(url: str) -> str | None:
    if is_offline():
        return "HF_HUB_OFFLINE forbids the network"
    return None if reachable(url) else f"{url} cannot be reached"


@contextmanager
def _cache_only(enabled: bool) -> Iterator[None]:
    """Disable network access of both Hugging Face libraries, which have no argument for it."""
    import datasets.config
    import huggingface_hub.constants

    modules: Sequence[Any] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value or enabled
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def show_licence(name: str, licence: str, source: str) -> None:
    """Log the licence of a corpus as a warning, once per cache folder.

    Parameters
    ----------
    name, licence : str
        The corpus and its licence.
    source : str
        Address from which it is downloaded.
    """
    notice = f"corpus {name!r} is downloaded from {source}; its licence: {licence}"
    digest = hashlib.sha256(notice.encode()).hexdigest()
    shown = default_cache_dir() / "licences" / f"{re.sub(r'[^\w.-]+', '-', name)}-{digest[:12]}.txt"
    if shown.exists():
        return
    _log.warning("%s", notice)
    with suppress(OSError):  # a read-only cache shows it again
        shown.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(shown, notice)


@cache
def latest_commit(name: str, repo: str) -> str:
    """Return the newest commit of a dataset on the hub; the same one for the whole process.

    Parameters
    ----------
    name : str
        Name of the corpus in error messages.
    repo : str
        Name on the hub.

    Raises
    ------
    HubError
        If the hub is unreachable.
    ValueError
        If the hub has no such dataset, or the ``hub`` extra is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ValueError(
            f"corpus {name!r} needs the extra: pip install 'tjx-data[hub]'. {CORPUS_ALTERNATIVES}"
        ) from error
    if problem := _why_unreachable(endpoint()):
        raise HubError(
            f"corpus {name!r} names no commit, and {problem}; give @COMMIT (40 hexadecimal digits) "
            f"of a cached one. {CORPUS_ALTERNATIVES}"
        )
    try:
        commit = str(huggingface_hub.HfApi(endpoint=endpoint()).dataset_info(repo).sha)
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"corpus: got {name!r}; the hub has no such dataset: {error}") from error
    _log.warning(
        "corpus %r is at commit %s; add @%s to use the same text later", name, commit, commit
    )
    return commit


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
        Name of the corpus in error messages.
    repo, config, split : str
        Names on the hub.
    revision : str or None
        The commit; None for a local folder.
    streamed : bool
        Stream rows instead of downloading the dataset. If the hub is unreachable they are read from
        the cache, if another program stored them there.
    licence : str
        Logged before the first download.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        The rows.

    Raises
    ------
    HubError
        If the dataset is neither in the cache nor reachable.
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
        with _cache_only(problem is not None):
            builder = datasets.load.load_dataset_builder(repo, config, revision=revision)
            # Offline the library accepts any cached revision.
            if revision is not None and builder.hash != revision:
                raise HubError(f"{repo}: found revision {builder.hash}; expected {revision}")
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
    """Yield the text of each row of a hub dataset.

    Parameters
    ----------
    name, repo : str
        Name of the corpus, and its name on the hub.
    rows : datasets.Dataset or datasets.IterableDataset
        The rows.
    field : str
        Text of a row, as of `record_fields`.

    Raises
    ------
    HubError
        If the connection fails during streaming.
    """
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            try:
                text = record_text(row, field)
            except ValueError as error:
                yield Malformed(repo, number, str(error))
            else:
                yield text
    except OSError as error:
        raise HubError(
            f"corpus {name!r} ({repo}): reading stopped after {number} rows: {error}. Start again "
            "when the network is available"
        ) from error


def download_tokenizer(name: str, repos: Sequence[str]) -> Path:
    """Return the path of a hub tokenizer's ``tokenizer.json``, downloaded if not in the cache.

    Parameters
    ----------
    name : str
        Name given by the user, for error messages.
    repos : Sequence[str]
        Its names on the hub; the cache is searched for all, the first is downloaded.

    Raises
    ------
    HubError
        If it is neither in the cache nor reachable.
    ValueError
        If the ``hub`` extra is not installed, or the hub has no such tokenizer.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"tokenizer: got {name!r}; the Hugging Face hub needs the extra: pip install "
            f"'tjx-data[hub]'. {TOKENIZER_ALTERNATIVES}"
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
            f"tokenizer: got {name!r}; it is no local file or folder, is not in the hub's cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and {problem}"
            f"{hint or '.'} {TOKENIZER_ALTERNATIVES}"
        )
    try:
        return Path(huggingface_hub.hf_hub_download(repos[0], "tokenizer.json"))
    except HfHubHTTPError as error:
        raise ValueError(
            f"tokenizer: got {name!r}; it is no local file or folder, and {endpoint()}/{repos[0]} "
            f"has no readable tokenizer.json: {error}. {TOKENIZER_ALTERNATIVES}"
        ) from error


def download(name: str, url: str, sha256: str, file: Path, *, licence: str) -> Path:
    """Download a file once and verify its hash.

    Parameters
    ----------
    name : str
        Name of the corpus in error messages.
    url, sha256 : str
        Address and expected hash.
    file : Path
        Destination; an existing file with the right hash is reused.
    licence : str
        Logged before the first download.

    Returns
    -------
    Path
        `file`.

    Raises
    ------
    HubError
        If it was not downloaded before and the server is unreachable.
    ValueError
        If the content has another hash.
    """
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
        return file
    error_start = f"corpus {name!r} ({url}) is not in the cache {file.parent}, and"
    if problem := _why_unreachable(url):
        raise HubError(f"{error_start} {problem}. {CORPUS_ALTERNATIVES}")
    show_licence(name, licence, url)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310  our own address
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except OSError as error:
        raise HubError(
            f"{error_start} the download failed: {error}. {CORPUS_ALTERNATIVES}"
        ) from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url}: got more than {MAX_DOWNLOAD_BYTES} bytes; its content changed")
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{url}: got SHA-256 {found}; expected {sha256}; its content changed")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return file
