"""The corpora that have a name: a table with one small entry each."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tjx_data import hub, python_docs
from tjx_data.cache import default_cache_dir
from tjx_data.documents import Documents
from tjx_data.files import load_files
from tjx_data.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A corpus that comes with the interpreter."""

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    read: Callable[[], Iterable[str]]
    describe: Callable[[], dict[str, str]]

    def source(self) -> dict[str, str]:
        """Return what the text depends on."""
        return self.describe()

    def open(self, name: str) -> Callable[[], Iterable[str]]:
        """Return a function that starts a pass over the documents."""
        assert name
        return self.read


@dataclass(frozen=True, kw_only=True)
class Download:
    """A text file at a fixed address, known by its hash."""

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    url: str
    sha256: str

    def source(self) -> dict[str, str]:
        """Return what the text depends on."""
        return {"url": self.url, "sha256": self.sha256}

    def open(self, name: str) -> Callable[[], Iterable[str]]:
        """Fetch the file if need be; return a function that starts a pass over it."""
        file = (
            default_cache_dir() / "downloads" / f"{name}-{self.sha256[:12]}{Path(self.url).suffix}"
        )
        return load_files(hub.download(name, self.url, self.sha256, file)).read


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset on the Hugging Face hub, with the text in one field of its rows."""

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    repo: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    join: Callable[[Iterable[str]], Iterator[str]] | None = None  # rows to documents

    def source(self) -> dict[str, str]:
        """Return what the text depends on."""
        return {"hub": self.repo, "config": self.config or "", "split": self.split}

    def open(self, name: str) -> Callable[[], Iterable[str]]:
        """Download the dataset if need be; return a function that starts a pass over it."""
        rows = hub.load_rows(name, self.repo, self.config, self.split)
        if self.field not in rows.column_names:
            raise ValueError(f"{self.repo} has no field {self.field!r}, but {rows.column_names}")
        column = rows.select_columns([self.field])

        def read() -> Iterator[str]:
            texts = (row[self.field] for row in column)
            return texts if self.join is None else self.join(texts)

        return read


Entry = Embedded | Download | Hub

_TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")


def join_wikitext(lines: Iterable[str]) -> Iterator[str]:
    r"""Join WikiText's rows, which are lines, to articles, each from its title " = Title = ".

    Examples
    --------
    >>> list(join_wikitext(["", " = A = \n", "", " one \n", " = = B = = \n", " = C = \n"]))
    [' = A = \n one \n = = B = = \n', ' = C = \n']
    """
    article: list[str] = []
    for line in lines:
        if _TITLE.fullmatch(line) and article:
            yield "".join(article)
            article = []
        if line or article:
            article.append(line)
    if article:
        yield "".join(article)


_WIKITEXT_LICENCE = "CC BY-SA 3.0 and GFDL"

CORPORA: dict[str, Entry] = {
    "python-docs": Embedded(
        licence="Python Software Foundation License 2.0",
        tokenizer="bpe",
        read=python_docs.documents,
        describe=python_docs.source,
    ),
    "shakespeare": Download(
        licence="public domain",
        tokenizer="bpe",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "wikitext-2": Hub(
        licence=_WIKITEXT_LICENCE,
        tokenizer="gpt2",
        repo="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        join=join_wikitext,
    ),
    "wikitext-103": Hub(
        licence=_WIKITEXT_LICENCE,
        tokenizer="gpt2",
        repo="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        join=join_wikitext,
    ),
    "openwebtext": Hub(licence="CC0 1.0", tokenizer="gpt2", repo="Skylion007/openwebtext"),
    "tinystories": Hub(licence="CDLA-Sharing 1.0", tokenizer="gpt2", repo="roneneldan/TinyStories"),
}


# What can be named as a corpus and holds no text.
OTHER_DATA = {
    "mnist": "images of digits; path names the folder of their four files",
    "byte-reversal": "random strings of bytes and their reversals, made up as they are read",
}


def find_corpus(name: str) -> Entry:
    """Look a corpus up in the table, without touching its text.

    Raises
    ------
    ValueError
        If there is none of that name; the nearest right one is named.
    """
    if name in OTHER_DATA:
        raise ValueError(f"corpus={name!r} holds no text: {OTHER_DATA[name]}")
    if name not in CORPORA:
        every = [*CORPORA, *OTHER_DATA]
        raise ValueError(
            f"corpus={name!r} is unknown; there are {', '.join(every)}{did_you_mean(name, every)}"
        )
    return CORPORA[name]


def corpus_source(name: str) -> dict[str, str]:
    """Describe where a corpus comes from, without opening it."""
    entry = find_corpus(name)
    return {"corpus": name, "licence": entry.licence, **entry.source()}


def load_corpus(name: str) -> Documents:
    """Open a corpus by name.

    Parameters
    ----------
    name : str
        A key of `CORPORA`.

    Raises
    ------
    HubError
        If its text is neither here nor within reach; nothing is put in its place.
    ValueError
        If there is none of that name.
    """
    return Documents(corpus_source(name), find_corpus(name).open(name))
