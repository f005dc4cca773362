"""What a prepared set holds, for people: counts, lengths of documents, samples."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.loading.token_loader import TokenLoader
from tjx_data.prepared.document_starts import read_starts
from tjx_data.prepared.index import Index, check_hashes, check_size, read_index
from tjx_data.tokenization.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_MALFORMED_SHOWN = 5
_MALFORMED_CHARACTERS = 1000


def describe(directory: str | Path, *, samples: int = 1, characters: int = 200) -> str:
    """Return what a set holds, in lines.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    samples : int
        Training documents to show the beginning of, spread evenly over the split.
    characters : int
        Characters of each.

    Raises
    ------
    ValueError
        If there is no set, or it is damaged.
    """
    directory = Path(directory)
    index = read_index(directory)
    lines = [f"{name}: {value}" for name, value in index.source.items()]
    lines += [
        f"tokenizer: {index.tokenizer_fingerprint[:16]}, {index.vocab_size} tokens, {index.dtype}",
        f"held out: {index.holdout}, {index.holdout_fraction}",
        f"empty documents left out: {index.n_empty_documents}",
        *_malformed(directory, index),
    ]
    for name, split in index.splits.items():
        lines.append(
            f"{name}: {split.n_documents:,} documents, {split.n_text_bytes:,} bytes of text, "
            f"{split.n_tokens:,} tokens in {len(split.shards)} shards, "
            f"{split.n_text_bytes / max(split.n_tokens, 1):.2f} bytes a token"
        )
    lines += ["tokens in a training document:", *_bars(document_lengths(directory, "train"))]
    loader, tokenizer = TokenLoader(directory, seq_len=1, batch_size=1), Tokenizer.load(directory)
    for sample in range(min(samples, loader.n_documents)):
        number = sample * loader.n_documents // samples
        text = tokenizer.decode(loader.document(number)[:characters])[:characters]
        lines.append(f"training document {number} begins: {text!r}")
    return "\n".join(lines)


def verify(directory: str | Path) -> None:
    """Compare the hashes of all files of a set with its index.

    Raises
    ------
    ValueError
        Naming the first file that is not what the index says.
    """
    check_hashes(Path(directory), read_index(directory).files())


def document_lengths(directory: str | Path, split: SplitName) -> npt.NDArray[np.int64]:
    """Return the tokens of each document of a split, without ends of text, int64 [documents]."""
    index = read_index(directory)
    starts = read_starts(Path(directory), index, split)
    n_eot = 0 if index.eot_id is None else 1
    return np.diff(starts, append=index.splits[split].n_tokens) - n_eot


def draw_lengths(directory: str | Path, file: str | Path) -> None:
    """Draw a histogram of the documents' lengths, by the number of documents and of tokens.

    Parameters
    ----------
    directory : str or Path
        A prepared set.
    file : str or Path
        The picture; its suffix chooses the format (.png, .svg, .pdf).

    Raises
    ------
    ValueError
        If the ``plot`` extra is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs the extra: pip install 'tjx-data[plot]'") from error
    lengths = np.maximum(document_lengths(directory, "train"), 1)
    edges = np.geomspace(1, lengths.max() + 1, 50)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    for axes, weights, what in zip(
        figure.subplots(1, 2), (None, lengths), ("documents", "tokens"), strict=True
    ):
        axes.hist(lengths, bins=edges, weights=weights, color="tab:blue")
        axes.set(xscale="log", xlabel="tokens in a document", ylabel=what)
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


def _bars(lengths: npt.NDArray[np.int64]) -> list[str]:
    """Return a histogram in powers of two, in lines."""
    if not lengths.size:
        return []
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    first = int(np.flatnonzero(bins)[0])
    return [
        f"  up to {2**power:>9,}  {'#' * round(_BAR * count / bins.max()):<{_BAR}} {count:,}"
        for power, count in enumerate(bins.tolist())
        if power >= first
    ]
