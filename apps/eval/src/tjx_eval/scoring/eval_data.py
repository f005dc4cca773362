"""Documents to score: from files, from a corpus, or from the validation data of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_trainer.run_reader import TextData

_PREVIEW = 48  # characters


@dataclass(frozen=True)
class Document:
    """A text to score.

    Attributes
    ----------
    name : str
        Name of its source, and its number there.
    text : str
        The text.
    """

    name: str
    text: str

    @property
    def preview(self) -> str:
        """The first words, on one line."""
        return " ".join(self.text[: 4 * _PREVIEW].split())[:_PREVIEW]


@dataclass(frozen=True)
class EvalTexts:
    """Documents, which can be iterated once, and their common name."""

    name: str
    documents: Iterator[Document]


def load_texts(
    model: TrainedModel,
    *,
    data: Sequence[str] | None = None,
    text_field: str = "text",
    corpus: str | None = None,
) -> EvalTexts:
    """Open the documents to score.

    Parameters
    ----------
    model : TrainedModel
        Its run's validation data is the default.
    data : sequence of str, optional
        Files and patterns, as for `tjx_data.load_files`.
    text_field : str
        Name of the text field in records.
    corpus : str, optional
        Name of a corpus, or of one of its official splits, such as ``wikitext-103:test``. Without a
        split: the official validation split, else the official test split, else the whole corpus.

    Raises
    ------
    EvalError
        If both are given, or neither and the model is not a run; if files cannot be read or the
        corpus does not exist.
    tjx_data.HubError
        If the corpus is neither cached nor downloadable.
    """
    if data and corpus:
        raise EvalError("--data: not supported with --corpus; leave out one")
    try:
        if data:
            found = tjx_data.load_files(list(data), text_field=text_field)
            return EvalTexts(", ".join(data), _numbered(found))
        if corpus:
            name = tjx_data.evaluation_corpus(corpus)
            return EvalTexts(name, _numbered(tjx_data.load_corpus(name)))
    except tjx_data.HubError:
        raise
    except ValueError as error:
        raise EvalError(str(error)) from error
    if model.run is None:
        raise EvalError(f"{model.path}: a Transformers model has no validation data; give --data")
    if model.run.config.data.reads_tokens:
        raise EvalError(
            f"{model.path}: was trained on token ids, whose documents are unknown; give --data"
        )
    name = ", ".join(model.run.config.data.weights)
    text = model.run.prepared_text(model.tokenizer)
    return EvalTexts(f"{name} (validation)", _validation_documents(text))


def _numbered(documents: tjx_data.Documents) -> Iterator[Document]:
    """Yield documents, named by their file and their number in it."""
    numbers: dict[str, int] = {}
    for part in documents.parts():
        file: Any = getattr(part, "file", None)  # parts of a corpus have none
        name = "document" if file is None else Path(file).name
        for text in part.read():
            if isinstance(text, str) and text:
                numbers[name] = numbers.get(name, 0) + 1
                yield Document(f"{name} {numbers[name]}", text)


def _validation_documents(text: TextData) -> Iterator[Document]:
    for name, folder in text.folders.items():
        loader = tjx_data.TokenLoader(folder, split="validation", seq_len=1, batch_size=1)
        for number in range(loader.n_documents):
            tokens = loader.document(number)
            if len(tokens):
                yield Document(f"{Path(name).name} {number + 1}", text.tokenizer.decode(tokens))
