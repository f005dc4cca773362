"""Quality rules for documents, and masks for personal data: one table of each.

Sources: Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A1), C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2), FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.5), Dolma
(Soldaini et al. 2024, arXiv:2402.00159).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tjx_core import did_you_mean

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25aa")
_ELLIPSES = ("...", "\u2026")
# Besides ASCII: the ellipsis, the ends of sentences of Han texts, and closing quotation marks.
_STOPS = ".!?\u2026\u3002\uff01\uff1f"
_QUOTES = "\"'\u201d\u2019\u300d\u300f"
_SENTENCE_END = re.compile(rf"[{_STOPS}](?=[\s{_QUOTES})\]]|$)")
_LINE_ENDS = tuple(f"{_STOPS}{_QUOTES}:;)")


class Measures:
    """Properties of a document, each computed when a rule needs it.

    Parameters
    ----------
    text : str
        The document.
    """

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Parts between white space."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty, without white space around them."""
        return [line for raw in self.text.splitlines() if (line := raw.strip())]

    @property
    def n_words(self) -> float:
        """Number of words."""
        return len(self.words)

    @property
    def mean_word_length(self) -> float:
        """Characters per word."""
        return _share(sum(map(len, self.words)), len(self.words))

    @property
    def symbols_per_word(self) -> float:
        """Hash signs and ellipses per word."""
        n_symbols = self.text.count("#") + sum(map(self.text.count, _ELLIPSES))
        return _share(n_symbols, len(self.words))

    @property
    def bullet_lines(self) -> float:
        """Share of lines that start with a bullet."""
        return _share(sum(line.startswith(_BULLETS) for line in self.lines), len(self.lines))

    @property
    def ellipsis_lines(self) -> float:
        """Share of lines that end with an ellipsis."""
        return _share(sum(line.endswith(_ELLIPSES) for line in self.lines), len(self.lines))

    @property
    def alphabetic_words(self) -> float:
        """Share of words with a letter."""
        return _share(sum(any(map(str.isalpha, word)) for word in self.words), len(self.words))

    @property
    def stop_words(self) -> float:
        """Number of distinct English stop words of Gopher's list."""
        return len(_STOP_WORDS.intersection(word.lower() for word in self.words))

    @property
    def duplicate_lines(self) -> float:
        """Share of lines that an earlier line equals."""
        return _share(len(self.lines) - len(set(self.lines)), len(self.lines))

    @property
    def duplicate_line_characters(self) -> float:
        """Share of characters in lines that an earlier line equals."""
        n_all, n_distinct = sum(map(len, self.lines)), sum(map(len, set(self.lines)))
        return _share(n_all - n_distinct, n_all)

    def top_ngram(self, n: int) -> float:
        """Return the share of characters in the most frequent repeated n-gram of words."""
        counts = Counter(zip(*(self.words[i:] for i in range(n)), strict=False))
        if not counts:
            return 0.0
        ngram, count = max(counts.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
        n_characters = count * sum(map(len, ngram)) if count > 1 else 0
        return _share(n_characters, sum(map(len, self.words)))

    @property
    def sentences(self) -> float:
        """Number of ends of sentences."""
        return len(_SENTENCE_END.findall(self.text))

    @property
    def punctuated_lines(self) -> float:
        """Share of lines that end with a punctuation mark."""
        return _share(sum(line.endswith(_LINE_ENDS) for line in self.lines), len(self.lines))

    @property
    def short_lines(self) -> float:
        """Share of lines of less than 30 characters."""
        return _share(sum(len(line) < 30 for line in self.lines), len(self.lines))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Rule:
    """A document is kept if a measure of it lies within bounds.

    Attributes
    ----------
    name : str
        Name; the part before the first hyphen is the name of its group.
    measure : Callable
        The measure.
    minimum, maximum : float
        Bounds, both allowed.
    description : str
        The measure in words.
    """

    name: str
    measure: Callable[[Measures], float]
    minimum: float
    maximum: float
    description: str

    def keeps(self, measures: Measures) -> bool:
        """Return whether a document passes."""
        return self.minimum <= self.measure(measures) <= self.maximum


RULES: tuple[Rule, ...] = (
    Rule("gopher-words", lambda m: m.n_words, 50, 100_000, "words"),
    Rule("gopher-word-length", lambda m: m.mean_word_length, 3, 10, "characters per word"),
    Rule("gopher-symbols", lambda m: m.symbols_per_word, 0, 0.1, "# and ... per word"),
    Rule("gopher-bullets", lambda m: m.bullet_lines, 0, 0.9, "share of lines with a bullet"),
    Rule("gopher-ellipses", lambda m: m.ellipsis_lines, 0, 0.3, "share of lines ending in ..."),
    Rule("gopher-letters", lambda m: m.alphabetic_words, 0.8, 1, "share of words with a letter"),
    Rule("gopher-stop-words", lambda m: m.stop_words, 2, math.inf, "English stop words"),
    Rule("gopher-lines", lambda m: m.duplicate_lines, 0, 0.3, "share of repeated lines"),
    Rule("gopher-2-grams", lambda m: m.top_ngram(2), 0, 0.2, "share of the top 2-gram"),
    Rule("gopher-3-grams", lambda m: m.top_ngram(3), 0, 0.18, "share of the top 3-gram"),
    Rule("gopher-4-grams", lambda m: m.top_ngram(4), 0, 0.16, "share of the top 4-gram"),
    Rule("c4-lorem-ipsum", lambda m: "lorem ipsum" in m.text.lower(), 0, 0, "lorem ipsum"),
    Rule("c4-curly-bracket", lambda m: "{" in m.text, 0, 0, "curly bracket"),
    Rule("c4-sentences", lambda m: m.sentences, 3, math.inf, "sentences"),
    Rule("fineweb-punctuation", lambda m: m.punctuated_lines, 0.12, 1, "share of lines that end"),
    Rule("fineweb-duplicates", lambda m: m.duplicate_line_characters, 0, 0.1, "repeated text"),
    Rule("fineweb-short-lines", lambda m: m.short_lines, 0, 0.67, "share of lines under 30"),
)  # fmt: skip
"""The rules, in the order in which a document is tested."""


@dataclass(frozen=True)
class Mask:
    """Personal data that is replaced.

    Attributes
    ----------
    name : str
        Name.
    pattern : re.Pattern
        What is replaced.
    replacement : str
        The replacement.
    """

    name: str
    pattern: re.Pattern[str]
    replacement: str


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_EMAIL = r"\b[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
_IP = rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w.]*\d)"
_PHONE = r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\w)"
MASKS: tuple[Mask, ...] = (
    Mask("email", re.compile(_EMAIL), "<email>"),
    Mask("ip", re.compile(_IP), "<ip>"),
    Mask("phone", re.compile(_PHONE), "<phone>"),
)
"""The masks, in the order in which they are applied: FineWeb (email, ip), Dolma (phone)."""


def find_rules(names: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules of some names or groups (gopher, c4, fineweb), in the order of the table.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    groups = {rule.name.split("-")[0] for rule in RULES}
    _check_names("rules", names, {rule.name for rule in RULES} | groups)
    return tuple(rule for rule in RULES if {rule.name, rule.name.split("-")[0]} & set(names))


def find_masks(names: Sequence[str]) -> tuple[Mask, ...]:
    """Return the masks of some names, in the order of the table.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    _check_names("masks", names, {mask.name for mask in MASKS})
    return tuple(mask for mask in MASKS if mask.name in names)


def _check_names(argument: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{argument}: got {name!r}; expected some of {', '.join(sorted(known))}"
                f"{did_you_mean(name, known)}"
            )
