"""Corpora that other packages add by name."""

from collections.abc import Callable, Iterable
from typing import Literal

from tjx_core import ConfigError, Problem
from tjx_data.corpora.corpus_kinds import BundledCorpus
from tjx_data.corpora.registry import CORPORA, HUB_PREFIX, OTHER_DATA

_BUILT_IN = frozenset({*CORPORA, *OTHER_DATA, HUB_PREFIX})


def register_corpus(
    name: str,
    read: Callable[[], Iterable[str]],
    *,
    version: str,
    licence: str = "unknown",
    tokenizer: Literal["bpe", "gpt2"] = "bpe",
) -> None:
    """Add a corpus that `DataConfig.corpus`, mixtures and `load_corpus` select by name.

    Parameters
    ----------
    name : str
        The name, without ``:``, ``=`` and commas. Registering a name again replaces the entry,
        unless it is built in.
    read : callable
        Returns the documents, the same ones in the same order on every call.
    version : str
        Identifies the documents: change it when they change, so that prepared data are not reused.
    licence : str
        Licence of the text, stored in prepared data.
    tokenizer : {"bpe", "gpt2"}
        Tokenizer that "auto" selects: one trained on the corpus, or GPT-2's.

    Raises
    ------
    ConfigError
        If the name is built in or has a forbidden character.

    Examples
    --------
    >>> from tjx_data import DataConfig, load_corpus, register_corpus
    >>> register_corpus("sums", lambda: (f"{n}+{n}={2 * n}" for n in range(99)), version="1")
    >>> next(iter(load_corpus("sums"))), DataConfig(corpus="sums").corpus
    ('0+0=0', 'sums')
    """
    if not name or set(name) & set(":=,;") or name in _BUILT_IN:
        message = (
            f"got {name!r}; expected a name without ':', '=', ',' and ';' that is not built in "
            f"({', '.join(sorted(_BUILT_IN))}); choose another"
        )
        raise ConfigError([Problem("name", message)])
    CORPORA[name] = BundledCorpus(
        licence=licence, tokenizer=tokenizer, read=read, describe=lambda: {"version": version}
    )
