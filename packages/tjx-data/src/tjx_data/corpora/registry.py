"""Registry of named corpora."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tjx_core import ConfigError, Problem, unknown_name
from tjx_data.corpora import arithmetic, hub, python_docs, tiny_chat
from tjx_data.corpora.corpus_kinds import BundledCorpus, DownloadCorpus, Entry, HubCorpus
from tjx_data.corpora.documents import Documents, Malformed

HUB_PREFIX = "hub"
_SPLITS = ("train", "validation", "test")
_HUB_NAME = re.compile(
    r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?::([\w.-]+))?(?:@([0-9a-f]{40}))?"
)
_TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")


def join_wikitext(lines: Iterable[str | Malformed]) -> Iterator[str | Malformed]:
    r"""Join WikiText's rows, which are lines, to articles that start with " = Title = ".

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

CORPORA: dict[str, Entry] = {
    "python-docs": BundledCorpus(
        licence="Python Software Foundation License 2.0",
        tokenizer="bpe",
        read=python_docs.documents,
        describe=python_docs.source,
    ),
    "arithmetic": BundledCorpus(
        licence="public domain",
        tokenizer="bpe",
        read=arithmetic.documents,
        describe=arithmetic.source,
    ),
    "tiny-chat": BundledCorpus(
        licence="public domain",
        tokenizer="bpe",
        read=tiny_chat.documents,
        describe=tiny_chat.source,
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
"""Built-in corpora by name, each pinned by a hub commit, a SHA-256, or the Python version."""

OTHER_DATA = {
    "mnist": "images of digits; path is the folder of its four files, train-images-idx3-ubyte.gz "
    "and so on",
    "images": "images with labels; path is a folder in a format of datasets, or NAME@COMMIT on the "
    "Hugging Face hub",
    "byte-reversal": "random byte strings and their reversals, generated on access",
}
"""Descriptions of the data sets without text that ``DataConfig.corpus`` accepts."""


def is_corpus(name: str) -> bool:
    """Return whether a name, optionally with a split as in ``wikitext-2:test``, is a corpus."""
    return name.partition(":")[0] in (*CORPORA, HUB_PREFIX)


def parse_hub_name(name: str) -> HubCorpus:
    """Return the entry of a dataset named ``hub:OWNER/NAME[:CONFIG][:SPLIT][@COMMIT]``.

    A single part after the name is a split if it is train, validation or test; else a
    configuration.

    Raises
    ------
    ConfigError
        If the name has another form.

    Examples
    --------
    >>> entry = parse_hub_name("hub:allenai/c4:en:validation")
    >>> entry.repo, entry.config, entry.split, entry.revision
    ('allenai/c4', 'en', 'validation', None)
    """
    found = _HUB_NAME.fullmatch(name)
    if found is None:
        message = (
            f"got {name!r}; expected hub:OWNER/NAME[:CONFIG][:SPLIT][@COMMIT], with a commit of 40 "
            "hexadecimal digits, such as hub:allenai/c4:en:train"
        )
        raise ConfigError([Problem("corpus", message)])
    repo, first, second, revision = found.groups()
    config, split = (None, first) if first in _SPLITS and second is None else (first, second)
    return HubCorpus(
        licence="see the page of the dataset",
        tokenizer="gpt2",
        repo=repo,
        revision=revision,
        config=config,
        split=split or "train",
        streamed=True,
    )


def find_corpus(name: str) -> Entry:
    """Return the registry entry of a corpus, without opening its text.

    Parameters
    ----------
    name : str
        A key of `CORPORA`, optionally with an official split: ``wikitext-103:validation``; or a
        dataset of the hub, as of `parse_hub_name`.

    Raises
    ------
    ConfigError
        If the name is unknown (the message suggests the nearest one), holds no text, or has no such
        split.
    """
    base, colon, split = name.partition(":")
    if base == HUB_PREFIX:
        return parse_hub_name(name)
    if base in OTHER_DATA:
        message = f"got {name!r}, which holds no text: {OTHER_DATA[base]}; expected a text corpus"
        raise ConfigError([Problem("corpus", message)])
    if base not in CORPORA:
        raise ConfigError(
            [
                unknown_name(
                    "corpus", name, [*CORPORA, *OTHER_DATA], register="tjx_data.register_corpus"
                )
            ]
        )
    entry = CORPORA[base]
    if not colon:
        return entry
    splits = ("train", *held_out_splits(base))
    if split not in splits:
        message = f"got {name!r}; expected an official split of {base}: {' or '.join(splits)}"
        raise ConfigError([Problem("corpus", message)])
    return replace(entry, split=split) if isinstance(entry, HubCorpus) else entry


def held_out_splits(name: str) -> tuple[str, ...]:
    """Return the official splits of a corpus besides training; none for a name with a split."""
    entry = CORPORA.get(name)
    return entry.held_out if isinstance(entry, HubCorpus) else ()


def evaluation_corpus(name: str) -> str:
    """Return the name of the split of a corpus on which models are evaluated.

    This is the official validation split, else the official test split. Names of corpora without
    either, and names with a split, are returned unchanged.

    Parameters
    ----------
    name : str
        Name of a corpus, as for `load_corpus`.

    Returns
    -------
    str
        Name of a corpus with a split.

    Examples
    --------
    >>> evaluation_corpus("wikitext-103"), evaluation_corpus("wikitext-103:train")
    ('wikitext-103:validation', 'wikitext-103:train')
    >>> evaluation_corpus("python-docs")
    'python-docs'
    """
    splits = held_out_splits(name)
    return f"{name}:{splits[0]}" if splits else name


def corpus_source(name: str, *, text_field: str = "text") -> dict[str, str]:
    """Return the description of a corpus that is stored in prepared sets, without opening it.

    Parameters
    ----------
    name, text_field : str
        As of `load_corpus`.
    """
    entry = _entry(name, text_field)
    field = {"text_field": text_field} if name.startswith(f"{HUB_PREFIX}:") else {}
    return {"corpus": name, "licence": entry.licence, **entry.source(), **field}


def _entry(name: str, text_field: str) -> Entry:
    """Return the entry of a corpus; a dataset of the hub with its field and its commit."""
    entry = find_corpus(name)
    if not name.startswith(f"{HUB_PREFIX}:"):
        return entry
    assert isinstance(entry, HubCorpus)
    commit = entry.revision or hub.latest_commit(name, entry.repo)
    return replace(entry, field=text_field, revision=commit)


def load_corpus(name: str, *, text_field: str = "text", with_validation: bool = False) -> Documents:
    """Open a corpus by name.

    Parameters
    ----------
    name : str
        As of `find_corpus`; without a split the training text.
    text_field : str
        Field or template of the text, for ``hub:`` names; other corpora have their own.
    with_validation : bool
        Whether to open the official validation split too, as ``held_out``.

    Returns
    -------
    Documents
        The documents.

    Raises
    ------
    HubError
        If the corpus is neither in the cache nor reachable.
    ValueError
        If the name is unknown.
    """
    source = corpus_source(name, text_field=text_field)
    documents = _entry(name, text_field).open(name, source)
    if not with_validation:
        return documents
    held_out = load_corpus(f"{name}:validation")
    source = {**documents.source, "held_out": held_out.source["split"]}
    return replace(documents, source=source, held_out=held_out.parts)
