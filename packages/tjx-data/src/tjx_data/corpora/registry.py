"""The corpora that have a name: a table with one small entry each."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tjx_data.cache import default_cache_dir
from tjx_data.corpora import hub, python_docs
from tjx_data.corpora.documents import Documents, Malformed
from tjx_data.corpora.files import load_files
from tjx_data.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class BundledCorpus:
    """A corpus that comes with the interpreter."""

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    read: Callable[[], Iterable[str]]
    describe: Callable[[], dict[str, str]]

    def source(self) -> dict[str, str]:
        """Return what the text depends on."""
        return self.describe()

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Return the documents."""
        assert name
        return Documents.of(self.read, source)


@dataclass(frozen=True, kw_only=True)
class DownloadCorpus:
    """A text file at a fixed address, known by its hash."""

    licence: str
    tokenizer: Literal["bpe", "gpt2"]
    url: str
    sha256: str

    def source(self) -> dict[str, str]:
        """Return what the text depends on."""
        return {"url": self.url, "sha256": self.sha256}

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Fetch the file if need be, and return its documents."""
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
        What the text may be used under, and what "auto" chooses.
    repo, config, split : str
        What it is called on the hub; `repo` can also be a local folder in the hub's format.
    held_out : tuple of str
        Its official splits besides training, of "validation" and "test".
    revision : str or None
        The commit, 40 hexadecimal digits; None for a local folder alone.
    field : str
        Where the text is.
    streamed : bool
        Whether it is too large to be downloaded whole: rows are fetched as they are read.
    join : Callable or None
        Makes documents of rows, where a row is not one.
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
        """Return what the text depends on."""
        return {
            "hub": self.repo,
            "config": self.config or "",
            "split": self.split,
            "revision": self.revision or "",
        }

    def open(self, name: str, source: dict[str, str]) -> Documents:
        """Download the dataset if need be, and return its documents."""
        rows = hub.load_rows(
            name,
            self.repo,
            self.config,
            self.split,
            revision=self.revision,
            streamed=self.streamed,
            licence=self.licence,
        )
        # Of streamed JSON lines nobody knows the fields before the first row.
        fields = rows.column_names or list(next(iter(rows), {}))
        if self.field not in fields:
            raise ValueError(f"{self.repo} has no field {self.field!r}, but {fields}")
        column = rows.select_columns([self.field])

        def read() -> Iterator[str | Malformed]:
            texts = hub.read_texts(name, self.repo, column, self.field)
            return texts if self.join is None else self.join(texts)

        return Documents.of(read, source)


Entry = BundledCorpus | DownloadCorpus | HubCorpus

_TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")


def join_wikitext(lines: Iterable[str | Malformed]) -> Iterator[str | Malformed]:
    r"""Join WikiText's rows, which are lines, to articles, each from its title " = Title = ".

    Examples
    --------
    >>> list(join_wikitext(["", " = A = \n", "", " one \n", " = = B = = \n", " = C = \n"]))
    [' = A = \n one \n = = B = = \n', ' = C = \n']
    """
    article: list[str] = []
    for line in lines:
        if isinstance(line, Malformed):
            yield line
            continue
        if _TITLE.fullmatch(line) and article:
            yield "".join(article)
            article = []
        if line or article:
            article.append(line)
    if article:
        yield "".join(article)


_WIKIPEDIA_LICENCE = "CC BY-SA 3.0 and GFDL"
_CRAWL_LICENCE = "ODC-By 1.0, and Common Crawl's terms of use"
_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

# Each is pinned: by a commit of the hub, by a SHA-256, or by the version of Python.
CORPORA: dict[str, Entry] = {
    "python-docs": BundledCorpus(
        licence="Python Software Foundation License 2.0",
        tokenizer="bpe",
        read=python_docs.documents,
        describe=python_docs.source,
    ),
    "shakespeare": DownloadCorpus(
        licence="public domain",
        tokenizer="bpe",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": HubCorpus(
        licence="CDLA-Sharing 1.0",
        tokenizer="gpt2",
        repo="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        held_out=("validation",),
    ),
    "wikitext-2": HubCorpus(
        licence=_WIKIPEDIA_LICENCE,
        tokenizer="gpt2",
        repo="Salesforce/wikitext",
        revision=_WIKITEXT_REVISION,
        config="wikitext-2-raw-v1",
        held_out=("validation", "test"),
        join=join_wikitext,
    ),
    "wikitext-103": HubCorpus(
        licence=_WIKIPEDIA_LICENCE,
        tokenizer="gpt2",
        repo="Salesforce/wikitext",
        revision=_WIKITEXT_REVISION,
        config="wikitext-103-raw-v1",
        held_out=("validation", "test"),
        join=join_wikitext,
    ),
    "openwebtext": HubCorpus(
        licence="CC0 1.0",
        tokenizer="gpt2",
        repo="Skylion007/openwebtext",
        revision="b4325f019c648b1641a1784748667e8b74e5e064",
        streamed=True,
    ),
    "c4": HubCorpus(
        licence=_CRAWL_LICENCE,
        tokenizer="gpt2",
        repo="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        config="en",
        held_out=("validation",),
        streamed=True,
    ),
    "fineweb-edu": HubCorpus(
        licence=_CRAWL_LICENCE,
        tokenizer="gpt2",
        repo="HuggingFaceFW/fineweb-edu",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        config="sample-10BT",
        streamed=True,
    ),
    "wikipedia": HubCorpus(
        licence=_WIKIPEDIA_LICENCE,
        tokenizer="gpt2",
        repo="wikimedia/wikipedia",
        revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        config="20231101.en",
        streamed=True,
    ),
}


# What can be named as a corpus and holds no text.
OTHER_DATA = {
    "mnist": "images of digits; path names the folder of their four files, "
    "train-images-idx3-ubyte.gz and so on",
    "images": "images with labels; path names a folder that datasets reads, or NAME@COMMIT on the "
    "Hugging Face hub",
    "byte-reversal": "random strings of bytes and their reversals, made up as they are read",
}


def is_corpus(name: str) -> bool:
    """Tell whether a name, perhaps with a split as in ``wikitext-2:test``, is of a corpus."""
    return name.partition(":")[0] in CORPORA


def find_corpus(name: str) -> Entry:
    """Look a corpus up in the table, without touching its text.

    Parameters
    ----------
    name : str
        A key of `CORPORA`, or one with an official split: ``wikitext-103:validation``.

    Raises
    ------
    ValueError
        If there is none of that name, and the nearest right one is named; or it has no such split.
    """
    base, colon, split = name.partition(":")
    if base in OTHER_DATA:
        raise ValueError(f"corpus={name!r} holds no text: {OTHER_DATA[base]}")
    if base not in CORPORA:
        every = [*CORPORA, *OTHER_DATA]
        raise ValueError(
            f"corpus={name!r} is unknown; there are {', '.join(every)}{did_you_mean(base, every)}"
        )
    entry = CORPORA[base]
    if not colon:
        return entry
    splits = ("train", *held_out_splits(base))
    if split not in splits:
        raise ValueError(
            f"corpus: got {name!r}; expected an official split of {base}, {' or '.join(splits)}; "
            f"give {base}:{splits[-1]}"
        )
    return replace(entry, split=split) if isinstance(entry, HubCorpus) else entry


def held_out_splits(name: str) -> tuple[str, ...]:
    """Return the official splits of a corpus besides training; none where a split is named."""
    entry = CORPORA.get(name)
    return entry.held_out if isinstance(entry, HubCorpus) else ()


def evaluation_corpus(name: str) -> str:
    """Return the name of the text of a corpus that models are evaluated on.

    That is its official validation split, else its official test split. A corpus without either,
    and a name that says a split, stay as they are.

    Examples
    --------
    >>> evaluation_corpus("wikitext-103"), evaluation_corpus("wikitext-103:train")
    ('wikitext-103:validation', 'wikitext-103:train')
    >>> evaluation_corpus("python-docs")
    'python-docs'
    """
    splits = held_out_splits(name)
    return f"{name}:{splits[0]}" if splits else name


def corpus_source(name: str) -> dict[str, str]:
    """Describe where a corpus comes from, without opening it."""
    entry = find_corpus(name)
    return {"corpus": name, "licence": entry.licence, **entry.source()}


def load_corpus(name: str, *, with_validation: bool = False) -> Documents:
    """Open a corpus by name.

    Parameters
    ----------
    name : str
        As of `find_corpus`; without a split the training text.
    with_validation : bool
        Whether its official validation split is opened too, as ``held_out``.

    Raises
    ------
    HubError
        If its text is neither here nor within reach; nothing is put in its place.
    ValueError
        If there is none of that name.
    """
    documents = find_corpus(name).open(name, corpus_source(name))
    if not with_validation:
        return documents
    held_out = load_corpus(f"{name}:validation")
    source = {**documents.source, "held_out": held_out.source["split"]}
    return replace(documents, source=source, held_out=held_out.parts)
