"""Texts to evaluate a model on: files, a corpus, or what a run held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_trainer.tasks.text_data import TextData, open_text

_SHOWN = 48  # characters of a text that name it


@dataclass(frozen=True)
class Document:
    """A text that is scored.

    Attributes
    ----------
    name : str
        Where it comes from, and its number there.
    text : str
        All of it.
    """

    name: str
    text: str

    @property
    def beginning(self) -> str:
        """Its first words, in a line."""
        return " ".join(self.text[: 4 * _SHOWN].split())[:_SHOWN]


@dataclass(frozen=True)
class Texts:
    """Documents to be read once, and what they are called together."""

    name: str
    documents: Iterator[Document]


def open_texts(
    model: TrainedModel,
    *,
    data: Sequence[str] | None = None,
    text_field: str = "text",
    corpus: str | None = None,
) -> Texts:
    """Open the texts of a question.

    Parameters
    ----------
    model : TrainedModel
        Whose held-out text is taken where nothing else is named.
    data : sequence of str, optional
        Files and patterns, as `tjx_data.load_files` reads them.
    text_field : str
        Where the text is in a record.
    corpus : str, optional
        A corpus by name, or one of its official splits as in ``wikitext-103:test``. Without a split
        the official validation text, else the official test text, else all of the corpus.

    Raises
    ------
    RunError
        If both are given, or nothing and the model has no run; if files cannot be read, or there
        is no such corpus.
    tjx_data.HubError
        If the corpus is neither in the cache nor within reach.
    """
    if data and corpus:
        raise EvalError("--data and --corpus are both given: leave out one")
    try:
        if data:
            found = tjx_data.load_files(list(data), text_field=text_field)
            return Texts(", ".join(data), _named(found))
        if corpus:
            name = tjx_data.evaluation_corpus(corpus)
            return Texts(name, _named(tjx_data.load_corpus(name)))
    except tjx_data.HubError:
        raise
    except ValueError as error:
        raise EvalError(str(error)) from error
    if model.config is None:
        raise EvalError(f"{model.path}: a folder of transformers has no text; give --data FILE")
    name = ", ".join(model.config.data.weights)
    return Texts(f"{name} (held out)", _held_out(run_text(model)))


def run_text(model: TrainedModel) -> TextData:
    """Return the prepared text of a run; made again where the cache was emptied."""
    assert model.config is not None
    pointer = model.run.read_data_pointer()
    if pointer is not None and all((f / "index.json").is_file() for f in pointer.folders.values()):
        return TextData(pointer.folders, model.tokenizer)
    return open_text(model.config)


def _named(documents: tjx_data.Documents) -> Iterator[Document]:
    numbers: dict[str, int] = {}
    for part in documents.parts():
        file: Any = getattr(part, "file", None)  # parts of a corpus have none
        name = "document" if file is None else Path(file).name
        for text in part.read():
            if isinstance(text, str) and text:
                numbers[name] = numbers.get(name, 0) + 1
                yield Document(f"{name} {numbers[name]}", text)


def _held_out(text: TextData) -> Iterator[Document]:
    for name, folder in text.folders.items():
        loader = tjx_data.TokenLoader(folder, split="validation", seq_len=1, batch_size=1)
        for number in range(loader.n_documents):
            tokens = loader.document(number)
            if len(tokens):
                yield Document(f"{Path(name).name} {number + 1}", text.tokenizer.decode(tokens))
