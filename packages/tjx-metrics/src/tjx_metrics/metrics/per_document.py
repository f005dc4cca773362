"""Per-document loss sums, on the host in float64."""

import numpy as np
from numpy.typing import NDArray

from tjx_metrics.metrics.accumulators import Evaluation


class DocumentSums:
    """Sum the losses of labels per document.

    A document may span several rows and batches, and a row may hold several documents.

    Parameters
    ----------
    n_documents : int
        Documents are numbered 0 .. `n_documents` - 1.

    Attributes
    ----------
    loss_sums : float64 array [n_documents]
        Sum of losses, nats.
    tokens : int64 array [n_documents]
        Number of labels.
    text_bytes : int64 array [n_documents]
        UTF-8 bytes of the labels.

    Raises
    ------
    ValueError
        If the number of documents is negative.

    Examples
    --------
    >>> sums = DocumentSums(2)
    >>> sums.add(np.array([[0, 0, 1, -1]]), np.array([[1.0, 2.0, 4.0, 9.0]], np.float32))
    >>> sums.loss_sums.tolist(), sums.tokens.tolist()
    ([3.0, 4.0], [2, 1])
    """

    def __init__(self, n_documents: int) -> None:
        if n_documents < 0:
            raise ValueError(f"n_documents: got {n_documents}; expected at least 0")
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
        """Add the losses of labels.

        Parameters
        ----------
        documents : int array [...]
            Document of each label; labels with -1 are skipped.
        losses : float array [...]
            Loss of each label, nats.
        text_bytes : int array [...], optional
            UTF-8 bytes of each label.

        Raises
        ------
        ValueError
            If the shapes differ or a document number is out of range.
        """
        for name, other in (("losses", losses), ("text_bytes", text_bytes)):
            if other is not None and other.shape != documents.shape:
                raise ValueError(
                    f"{name}: got shape {other.shape}; expected {documents.shape}, the shape of "
                    "documents"
                )
        n_documents = len(self.tokens)
        counted = documents != -1
        index = documents[counted].astype(np.int64)
        if index.size and not 0 <= index.min() <= index.max() < n_documents:
            raise ValueError(
                f"documents: got numbers from {index.min()} to {index.max()}; expected -1 or "
                f"0 to {n_documents - 1}"
            )
        self.loss_sums += np.bincount(index, losses[counted].astype(np.float64), n_documents)
        self.tokens += np.bincount(index, minlength=n_documents)
        if text_bytes is not None:
            self._is_text = True
            np.add.at(self.text_bytes, index, text_bytes[counted].astype(np.int64))

    def evaluation(self, document: int) -> Evaluation:
        """Return the sums of one document.

        Parameters
        ----------
        document : int
            Number of the document, from 0.

        Returns
        -------
        Evaluation
            Its loss, tokens and bytes.
        """
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
