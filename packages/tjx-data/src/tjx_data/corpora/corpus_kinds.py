"""Kinds of named corpora: in the Python installation, a pinned file, a dataset of the hub."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tjx_data.cache import default_cache_dir
from tjx_data.corpora import hub
from tjx_data.corpora.documents import Documents, Malformed
from tjx_data.corpora.files import load_files
from tjx_data.corpora.text_template import record_fields


@dataclass(frozen=True, kw_only=True)
class BundledCorpus:
    """A corpus in the Python installation.

    Attributes
    ----------
    licence, tokenizer : str
        Licence of the text, and the tokenizer that "auto" selects.
    read : Callable
        Returns the documents.
    describe : Callable
        Returns the values that determine the text.
    """

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    read: Callable[[], Iterable[str]]
    describe: Callable[[], dict[str, str]]

    def source(self) -> dict[str, str]:
        """Return the values that determine the text."""
        return self.describe()

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Return the documents of the corpus."""
        assert name
        return Documents.of(self.read, source)


@dataclass(frozen=True, kw_only=True)
class DownloadCorpus:
    """A text file at a fixed address, pinned by its hash.

    Attributes
    ----------
    licence, tokenizer : str
        Licence of the text, and the tokenizer that "auto" selects.
    url, sha256 : str
        Address and hash of the file.
    """

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    url: str
    sha256: str

    def source(self) -> dict[str, str]:
        """Return the values that determine the text."""
        return {"url": self.url, "sha256": self.sha256}

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Return the documents of the file, downloaded if not in the cache."""
        file = (
            default_cache_dir() / "downloads" / f"{name}-{self.sha256[:12]}{Path(self.url).suffix}"
        )
        hub.download(name, self.url, self.sha256, file, licence=self.licence)
        return replace(load_files(file), source=source)


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A dataset on the Hugging Face hub, with the text in one field of its rows.

    Attributes
    ----------
    licence, tokenizer : str
        Licence of the text, and the tokenizer that "auto" selects.
    repo, config, split : str
        Names on the hub; `repo` can also be a local folder in the hub's format.
    held_out : tuple of str
        Official splits besides training, of "validation" and "test".
    revision : str or None
        The commit, 40 hexadecimal digits; None for a local folder only.
    field : str
        Field of the text, or a template, as of `record_fields`.
    streamed : bool
        Whether rows are streamed, for datasets too large to download.
    join : Callable or None
        Joins rows to documents; None if each row is one.
    """

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    repo: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    held_out: tuple[str, ...] = ()
    field: str = "text"
    streamed: bool = False
    join: Callable[[Iterable[str | Malformed]], Iterator[str | Malformed]] | None = None

    def source(self) -> dict[str, str]:
        """Return the values that determine the text."""
        return {
            "hub": self.repo,
            "config": self.config or "",
            "split": self.split,
            "revision": self.revision or "",
        }

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Return the documents of the dataset, downloaded if not in the cache."""
        rows = hub.load_rows(
            name,
            self.repo,
            self.config,
            self.split,
            revision=self.revision,
            streamed=self.streamed,
            licence=self.licence,
        )
        # The fields of streamed JSON lines are known from the first row only.
        fields = rows.column_names or list(next(iter(rows), {}))
        needed = record_fields(self.field)
        for field in needed:
            if field not in fields:
                raise ValueError(
                    f"{self.repo}: has no field {field!r}; expected one of {', '.join(fields)}; "
                    "give --data.text_field"
                )
        column = rows.select_columns(list(needed))

        def read() -> Iterator[str | Malformed]:
            texts = hub.read_texts(name, self.repo, column, self.field)
            return texts if self.join is None else self.join(texts)

        return Documents.of(read, source)


Entry = BundledCorpus | DownloadCorpus | HubCorpus
