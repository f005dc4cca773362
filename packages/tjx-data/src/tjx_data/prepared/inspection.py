"""Reports about a prepared set: counts, document lengths, samples and hash verification."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.errors import DataError
from tjx_data.loading.token_loader import TokenLoader
from tjx_data.prepared.index import Index, read_index
from tjx_data.prepared.integrity import check_hashes, check_size, read_starts
from tjx_data.tokenization.tokenizer import Tokenizer

_BAR_WIDTH = 40
_MALFORMED_SHOWN = 5
_MALFORMED_CHARACTERS = 1000


def describe(directory: str | Path, *, samples: int = 1, characters: int = 200) -> str:
    """Describe a prepared set as text: source, counts, document lengths and samples.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    samples : int
        Number of training documents of which the start is shown, evenly spaced over the split.
    characters : int
        Characters shown of each.

    Returns
    -------
    str
        Several lines.

    Raises
    ------
    ValueError
        If the folder holds no prepared set, or the set is damaged.
    """
    directory = Path(directory)
    index = read_index(directory)
    lines = [f"{name}: {value}" for name, value in index.source.items()]
    lines += [
        f"tokenizer: {index.tokenizer_fingerprint[:16]}, {index.vocab_size} tokens, {index.dtype}",
        f"holdout: {index.holdout}, {index.holdout_fraction}",
        f"empty documents left out: {index.n_empty_documents}",
        *_malformed(directory, index),
    ]
    for name, split in index.splits.items():
        lines.append(
            f"{name}: {split.n_documents:,} documents, {split.n_text_bytes:,} bytes of text, "
            f"{split.n_tokens:,} tokens in {len(split.shards)} shards, "
            f"{split.n_text_bytes / max(split.n_tokens, 1):.2f} bytes/token"
        )
    lines += ["tokens per training document:", *_histogram(document_lengths(directory, "train"))]
    loader, tokenizer = TokenLoader(directory, seq_len=1, batch_size=1), Tokenizer.load(directory)
    for sample in range(min(samples, loader.n_documents)):
        number = sample * loader.n_documents // samples
        try:
            text = tokenizer.decode(loader.document(number)[:characters])[:characters]
        except ValueError as error:
            raise DataError(f"{directory}: training document {number}: {error}") from error
        lines.append(f"start of training document {number}: {text!r}")
    return "\n".join(lines)


def verify(directory: str | Path) -> None:
    """Compare the SHA-256 of all files of a prepared set with its index.

    Parameters
    ----------
    directory : str or Path
        A prepared set.

    Raises
    ------
    ValueError
        If a file differs; the message names the first one.
    """
    check_hashes(Path(directory), read_index(directory).files())


def document_lengths(directory: str | Path, split: SplitName) -> npt.NDArray[np.int64]:
    """Return the length of each document in tokens, without end of text, int64 [documents]."""
    index = read_index(directory)
    starts = read_starts(Path(directory), index, split)
    n_eot = 0 if index.eot_id is None else 1
    return np.diff(starts, append=index.splits[split].n_tokens) - n_eot


def draw_lengths(directory: str | Path, file: str | Path) -> None:
    """Plot histograms of the lengths of training documents, by documents and by tokens.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    file : str or Path
        Output image; its suffix selects the format (.png, .svg, .pdf).

    Raises
    ------
    ValueError
        If the ``plot`` extra is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need the extra: pip install 'tjx-data[plot]'") from error
    lengths = np.maximum(document_lengths(directory, "train"), 1)
    edges = np.geomspace(1, lengths.max() + 1, 50)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    for axes, weights, unit in zip(
        figure.subplots(1, 2), (None, lengths), ("documents", "tokens"), strict=True
    ):
        axes.hist(lengths, bins=edges, weights=weights, color="tab:blue")
        axes.set(xscale="log", xlabel="tokens per document", ylabel=unit)
        axes.axvline(np.median(lengths), color="tab:orange", label="median document")
    axes.legend()
    figure.suptitle(f"{len(lengths):,} training documents, {lengths.sum():,} tokens")
    figure.savefig(file, dpi=120)


def _malformed(directory: Path, index: Index) -> list[str]:
    if index.malformed is None:
        return []
    check_size(directory, index.malformed)
    with (directory / index.malformed.name).open(encoding="utf-8", errors="replace") as file:
        shown = [file.readline(_MALFORMED_CHARACTERS).strip() for _ in range(_MALFORMED_SHOWN)]
    return [
        f"malformed records left out: {index.n_malformed}, listed in "
        f"{directory / index.malformed.name}; the first:",
        *filter(None, shown),
    ]


def _histogram(lengths: npt.NDArray[np.int64]) -> list[str]:
    """Return a text histogram with bins of powers of two, one line per bin."""
    if not lengths.size:
        return []
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    first = int(np.flatnonzero(bins)[0])
    return [
        f"  up to {2**power:>9,}  {'#' * round(_BAR_WIDTH * count / bins.max()):<{_BAR_WIDTH}} "
        f"{count:,}"
        for power, count in enumerate(bins.tolist())
        if power >= first
    ]
