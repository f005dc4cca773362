"""Compare vocabulary sizes: bytes per token by source, and tokens of the same text by language."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from experiments.command import Experiment, Options, main
from experiments.page import Claim, Page
from experiments.pictures import color, dress, legend_below, panels
from experiments.runs import Json, say
from matplotlib.figure import Figure

from tjx_data import Tokenizer, load_corpus, train_bpe
from tjx_data.corpora.documents import assign_split

DATA = "TJX_TEST_DATA"
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HELD_OUT = 0.1
ENGLISH, BOTH, GPT2 = "English", "all languages", "GPT-2"
FILES = {
    "books": "books/*.txt",
    "TinyStories": "tinystories_2M.txt",
    "Shakespeare": "shakespeare.txt",
    "WikiText-2": "wikitext2/test.raw.txt",
}
DECLARATION = "udhr/*.txt"
REPEATS = 20  # of the small translated texts in the training text
NAMES = {
    "amh": "Amharic", "arb": "Arabic", "ben": "Bengali", "cmn_hans": "Chinese", "deu": "German",
    "ell_monotonic": "Greek", "eng": "English", "fin": "Finnish", "fra": "French",
    "heb": "Hebrew", "hin": "Hindi", "hye": "Armenian", "ita": "Italian", "jpn": "Japanese",
    "kat": "Georgian", "kor": "Korean", "pol": "Polish", "por_PT": "Portuguese", "rus": "Russian",
    "spa": "Spanish", "tam": "Tamil", "tha": "Thai", "tur": "Turkish", "ukr": "Ukrainian",
    "vie": "Vietnamese",
}  # fmt: skip

Split = tuple[list[str], list[str]]  # training and held-out texts


def read_sources() -> dict[str, Split]:
    """Return the texts of each source: the documentation of Python, and those of the folder."""
    documents = list(load_corpus("python-docs"))
    splits = [assign_split(text, HELD_OUT) == "train" for text in documents]
    found = {
        "python-docs": (
            [text for text, is_train in zip(documents, splits, strict=True) if is_train],
            [text for text, is_train in zip(documents, splits, strict=True) if not is_train],
        )
    }
    if DATA in os.environ:
        for name, pattern in FILES.items():
            files = sorted(Path(os.environ[DATA]).glob(pattern))
            texts = [file.read_text(encoding="utf-8") for file in files]
            ends = [text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1 for text in texts]
            found[name] = (
                [text[:end] for text, end in zip(texts, ends, strict=True)],
                [text[end:] for text, end in zip(texts, ends, strict=True)],
            )
    return found


def read_languages() -> dict[str, Split]:
    """Return both halves of the Universal Declaration of Human Rights in each language."""
    found = {}
    for file in sorted(Path(os.environ.get(DATA, ".")).glob(DECLARATION)):
        if file.stem in NAMES:
            # Without indentation, whose spaces some vocabularies join and others do not.
            stripped = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
            lines = [f"{line}\n" for line in stripped if line]
            half = len(lines) // 2
            found[NAMES[file.stem]] = (["".join(lines[:half])], ["".join(lines[half:])])
    return found


def count(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """Return the bytes and the tokens of some texts."""
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode()) for text in texts), n_tokens


def measure(options: Options) -> Json:
    """Train tokenizers, of each size on English only; count tokens of held-out text."""
    if not options.smoke and DATA not in os.environ:
        raise SystemExit(f"{DATA}: not set; expected the folder with {DECLARATION} and the others")
    sources, languages = read_sources(), read_languages()
    english = [text for train, _ in sources.values() for text in train]
    translated = [text for train, _ in languages.values() for text in train]
    training = {ENGLISH: english, BOTH: [*english, *(REPEATS * translated)]}
    sizes = SIZES[:2] if options.smoke else SIZES
    rows = []
    tokenizers: list[tuple[str, int, Tokenizer]] = []
    for name, texts in training.items():
        for size in sizes if name == ENGLISH else sizes[-1:]:
            started = time.perf_counter()
            tokenizers.append((name, size, train_bpe(texts, size)))
            say(f"{name}, {size}: {time.perf_counter() - started:.0f} s")
    if DATA in os.environ:
        gpt2 = Tokenizer.load(Path(os.environ[DATA]) / "gpt2")
        tokenizers.append((GPT2, gpt2.vocab_size, gpt2))
    for name, size, tokenizer in tokenizers:
        for kind, texts_of in (("source", sources), ("language", languages)):
            for text_name, (_, held_out) in texts_of.items():
                n_bytes, n_tokens = count(tokenizer, held_out)
                rows.append(
                    {
                        "tokenizer": name, "vocab_size": size, "kind": kind, "text": text_name,
                        "bytes": n_bytes, "tokens": n_tokens,
                    }
                )  # fmt: skip
    trained_on = {name: sum(len(t.encode()) for t in texts) for name, texts in training.items()}
    return {"training_bytes": trained_on, "counts": rows}


def table_of(results: Json, kind: str) -> dict[str, dict[tuple[str, int], Json]]:
    """Return the counts of a kind of text, by text and tokenizer."""
    found: dict[str, dict[tuple[str, int], Json]] = {}
    for row in results["counts"]:
        if row["kind"] == kind:
            found.setdefault(row["text"], {})[row["tokenizer"], row["vocab_size"]] = row
    return found


def bytes_per_token(row: Json) -> float:
    """Return the bytes per token of a record."""
    return float(row["bytes"] / row["tokens"])


def sizes_of(results: Json, tokenizer: str) -> list[int]:
    """Return the vocabulary sizes of a tokenizer, ascending."""
    return sorted({r["vocab_size"] for r in results["counts"] if r["tokenizer"] == tokenizer})


def premium(languages: Mapping[str, Mapping[tuple[str, int], Json]], key: tuple[str, int]) -> Json:
    """Return the tokens of the same text in each language, relative to English."""
    english = languages["English"][key]["tokens"]
    return {name: each[key]["tokens"] / english for name, each in languages.items()}


def claims_of(results: Json) -> list[Claim]:
    """Return the claims."""
    sources, languages = table_of(results, "source"), table_of(results, "language")
    sizes = sizes_of(results, ENGLISH)
    grows = {
        name: [bytes_per_token(each[ENGLISH, size]) for size in sizes]
        for name, each in sources.items()
    }
    claims = [
        Claim(
            text="Every doubling of the vocabulary gives more bytes per token on every source.",
            holds=all((np.diff(values) > 0).all() for values in grows.values()),
            figures="; ".join(f"{k} {v[0]:.2f} to {v[-1]:.2f}" for k, v in grows.items()),
        ),
        Claim(
            text="Each doubling gains less than the one before, in the mean over the sources.",
            holds=bool((np.diff(np.mean(list(grows.values()), axis=0), 2) < 0).all()),
            figures=", ".join(f"{x:.2f}" for x in np.diff(np.mean(list(grows.values()), axis=0))),
        ),
    ]
    if not languages or not sizes_of(results, GPT2):
        return claims
    largest, gpt2 = sizes[-1], (GPT2, sizes_of(results, GPT2)[0])
    other = premium(languages, (ENGLISH, largest))
    mixed = premium(languages, (BOTH, largest))
    saved = {
        name: each[BOTH, largest]["tokens"] / each[ENGLISH, largest]["tokens"]
        for name, each in languages.items()
        if name != "English"
    }
    costs = [bytes_per_token(e[BOTH, largest]) for e in sources.values()]
    plain = [bytes_per_token(e[ENGLISH, largest]) for e in sources.values()]
    better = [
        bytes_per_token(each[ENGLISH, largest]) > bytes_per_token(each[gpt2])
        for each in sources.values()
    ]
    worst, worst_mixed = max(other, key=other.__getitem__), max(mixed, key=mixed.__getitem__)
    claims += [
        Claim(
            text=f"With {largest:,} ids trained on English, every other language needs more "
            "tokens than English for the same text.",
            holds=all(value > 1 for name, value in other.items() if name != "English"),
            figures=f"up to {other[worst]:.1f} times as many ({worst})",
        ),
        Claim(
            text="Translated text in the training text lowers the tokens of every other language.",
            holds=all(value < 1 for value in saved.values()),
            figures=f"{min(saved.values()):.2f} to {max(saved.values()):.2f} times as many; the "
            f"most is then {mixed[worst_mixed]:.1f} times those of English ({worst_mixed})",
        ),
        Claim(
            text="It costs less than 10 % of the bytes per token on every English source.",
            holds=all(a > 0.9 * b for a, b in zip(costs, plain, strict=True)),
            figures=", ".join(
                f"{a:.2f} against {b:.2f}" for a, b in zip(costs, plain, strict=True)
            ),
        ),
        Claim(
            text=f"{largest:,} ids trained on these sources have more bytes per token there than "
            f"the {gpt2[1]:,} of GPT-2.",
            holds=all(better),
            figures=f"on {sum(better)} of {len(better)} sources",
        ),
    ]
    return claims


def page(results: Json) -> Page:
    """Build the page from the results."""
    sources, languages = table_of(results, "source"), table_of(results, "language")
    sizes = sizes_of(results, ENGLISH)
    columns = [(ENGLISH, size) for size in sizes[:: max(len(sizes) // 2, 1)]]
    columns += [(BOTH, sizes[-1]), *((GPT2, size) for size in sizes_of(results, GPT2))]
    rows = [
        [name, *(f"{bytes_per_token(each[key]):.2f}" for key in columns)]
        for name, each in {**sources, **{f"UDHR {n}": e for n, e in languages.items()}}.items()
    ]
    megabytes = {name: n / 1e6 for name, n in results["training_bytes"].items()}
    return Page(
        title="Vocabulary size: bytes per token by source and language",
        question="How many bytes of text does a token hold, by vocabulary, source and language?",
        setup=(
            f"Byte-level BPE with GPT-2's splitting of words, trained on {megabytes[ENGLISH]:.1f} "
            f"MB of English: {', '.join(sources)}, without the last tenth of each. *{BOTH}* adds "
            "half of the Universal Declaration of Human Rights (UDHR) in "
            f"{len(languages)} languages, {REPEATS} times ({megabytes[BOTH]:.1f} MB together). "
            f"*{GPT2}* is OpenAI's vocabulary. Tokens are counted on held-out text: the last tenth "
            "of each source, and the other half of the UDHR, the same articles in each language. "
            f"Texts besides `python-docs` are read from the folder `{DATA}`."
        ),
        columns=["text", *(f"{name}, {size:,}" for name, size in columns)],
        rows=rows,
        table_note="Bytes of UTF-8 per token on held-out text, by tokenizer and vocabulary size.",
        picture=(
            "Left: bytes per token by vocabulary size, trained on English; crosses are GPT-2. "
            "Right: tokens of the same articles relative to English, with the largest vocabularies."
        ),
        claims=claims_of(results),
        conclusions=[
            "Losses per token of runs with other vocabularies cannot be compared, as a token holds "
            "another amount of text: compare bits per byte.",
            "Bytes per token differ by source with the same vocabulary. A budget of tokens is "
            "another amount of text for each source of a mixture.",
            "A vocabulary without text of a language makes its texts several times as long, and "
            "so its training and generation as expensive. A little text in the training text of "
            "the tokenizer, repeated, removes most of that.",
        ],
        limits=[
            "The UDHR is one short text of 10 to 40 kB a language, and its two halves share words: "
            "the gain of *all languages* is larger here than on other text.",
            "The scripts differ in bytes per character (1 for Latin, 2 for Cyrillic, 3 for most "
            "of Asia), so bytes per token cannot be compared between languages; the right panel "
            "compares tokens of the same articles.",
            "English text of megabytes; the gain of large vocabularies grows with the text.",
        ],
    )


def draw(results: Json) -> Figure:
    """Draw bytes per token over the size, and the tokens of each language."""
    sources, languages = table_of(results, "source"), table_of(results, "language")
    sizes = sizes_of(results, ENGLISH)
    figure, (left, right) = panels(2, height=5.2)
    for index, (name, each) in enumerate(sources.items()):
        values = [bytes_per_token(each[ENGLISH, size]) for size in sizes]
        left.plot(sizes, values, marker="o", markersize=3, color=color(index), label=name)
        for size in sizes_of(results, GPT2):
            left.plot([size], [bytes_per_token(each[GPT2, size])], "x", color=color(index))
    left.set_xscale("log", base=2)
    dress(left, x="vocabulary size", y="bytes per token", title="English sources")
    kinds = [(ENGLISH, sizes[-1]), (BOTH, sizes[-1])]
    kinds += [(GPT2, size) for size in sizes_of(results, GPT2)]
    if languages:
        order = sorted(languages, key=premium(languages, kinds[0]).__getitem__)
        for index, key in enumerate(kinds):
            found = premium(languages, key)
            right.plot(
                [found[name] for name in order], range(len(order)), "o^s"[index], markersize=4,
                color=color(len(sources) + index), label=f"{key[0]}, {key[1]:,}",
            )  # fmt: skip
        right.set_yticks(range(len(order)), order, fontsize=8)
        right.set_xscale("log", base=2)
        right.legend(fontsize=8)
    dress(right, x="tokens relative to English", y="", title="The same text by language")
    legend_below(figure, left)
    return figure


EXPERIMENT = Experiment(name="vocabulary_size", measure=measure, page=page, draw=draw, seeds=1)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
