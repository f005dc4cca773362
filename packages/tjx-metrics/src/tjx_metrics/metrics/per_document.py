"""Sums for each document of a corpus, on the host in float64."""

import numpy as np
from numpy.typing import NDArray

from tjx_metrics.metrics.accumulators import Evaluation


class DocumentSums:
    """Add up the losses of labels by the document that they belong to.

    A document may lie in several rows and batches, and a row may hold several documents.

    Parameters
    ----------
    n_documents : int
        Documents are 0 .. `n_documents` - 1.

    Attributes
    ----------
    loss_sums : float64 array [n_documents]
        Sums of losses, nats.
    tokens : int64 array [n_documents]
        Labels.
    text_bytes : int64 array [n_documents]
        Bytes of text that the labels stand for.

    Examples
    --------
    >>> sums = DocumentSums(2)
    >>> sums.add(np.array([[0, 0, 1, -1]]), np.array([[1.0, 2.0, 4.0, 9.0]], np.float32))
    >>> sums.loss_sums.tolist(), sums.tokens.tolist()
    ([3.0, 4.0], [2, 1])
    """

    def __init__(self, n_documents: int) -> None:
        if n_documents < 0:
            raise ValueError(f"n_documents={n_documents}: must be at least 0")
        self.loss_sums = np.zeros(n_documents, np.float64)
        self.tokens = np.zeros(n_documents, np.int64)
        self.text_bytes = np.zeros(n_documents, np.int64)
        self._is_text = False

    def add(
        self,
        documents: NDArray[np.integer],
        losses: NDArray[np.floating],
        text_bytes: NDArray[np.integer] | None = None,
    ) -> None:
        """Add labels.

        Parameters
        ----------
        documents : int array [...]
            The document of each label; -1 counts nowhere.
        losses : float array [...]
            Loss of each label, nats.
        text_bytes : int array [...], optional
            Bytes of text that each label stands for.

        Raises
        ------
        ValueError
            If the shapes differ, or there is no such document.
        """
        for name, other in (("losses", losses), ("text_bytes", text_bytes)):
            if other is not None and other.shape != documents.shape:
                raise ValueError(
                    f"{name} of shape {other.shape} for documents of shape {documents.shape}: "
                    "must be the same, one for each label"
                )
        n_documents = len(self.tokens)
        counted = documents != -1
        of = documents[counted].astype(np.int64)
        if of.size and not 0 <= of.min() <= of.max() < n_documents:
            raise ValueError(
                f"documents from {of.min()} to {of.max()}: must be -1 or below {n_documents}, the "
                "number of documents"
            )
        self.loss_sums += np.bincount(of, losses[counted].astype(np.float64), n_documents)
        self.tokens += np.bincount(of, minlength=n_documents)
        if text_bytes is not None:
            self._is_text = True
            np.add.at(self.text_bytes, of, text_bytes[counted].astype(np.int64))

    def evaluation(self, document: int) -> Evaluation:
        """Return the sums of a document."""
        return Evaluation(
            loss_sum=float(self.loss_sums[document]),
            tokens=int(self.tokens[document]),
            text_bytes=int(self.text_bytes[document]) if self._is_text else None,
        )

    def total(self) -> Evaluation:
        """Return the sums over all documents."""
        return Evaluation(
            loss_sum=float(self.loss_sums.sum()),
            tokens=int(self.tokens.sum()),
            text_bytes=int(self.text_bytes.sum()) if self._is_text else None,
        )
