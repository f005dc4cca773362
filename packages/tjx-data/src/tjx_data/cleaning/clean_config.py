"""Settings of the cleaning of a corpus."""

import math
from dataclasses import dataclass

from tjx_core import ConfigError, Problem, problems_of
from tjx_data.cleaning.repeated_spans import MIN_BYTES
from tjx_data.cleaning.rules import find_masks, find_rules


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Settings of `clean`.

    Attributes
    ----------
    rules : tuple of str
        Quality rules or groups of them: gopher, c4, fineweb, or single names from
        `tjx_data.cleaning.rules.RULES`.
    masks : tuple of str
        Personal data to mask: email, ip, phone.
    min_score : float or None
        Smallest score of a document, for example by a classifier of quality. Documents begin with
        a line of their score then; None if they have none.
    languages : tuple of str
        Languages to keep, as `language_identifier` names them; empty for all.
    language_identifier : str or None
        Function that identifies languages, as ``module:function``: from a text to (language,
        probability). Worker processes import it by this name.
    min_language_score : float
        Smallest probability of the language.
    exact_duplicates : bool
        Drop documents that an earlier one equals.
    near_duplicates : float or None
        Drop documents whose estimated Jaccard similarity (pairs of words) with an earlier one is at
        least this; None keeps them. Needs the extra ``near-duplicates``.
    repeated_spans : int or None
        Remove spans of at least this many bytes that occurred before in the kept documents; None
        keeps them. 50 tokens, as in Lee et al. (2022), are about 200 bytes of English.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    rules: tuple[str, ...] = ("gopher", "c4", "fineweb")
    masks: tuple[str, ...] = ("email", "ip")
    min_score: float | None = None
    languages: tuple[str, ...] = ()
    language_identifier: str | None = None
    min_language_score: float = 0.65
    exact_duplicates: bool = True
    near_duplicates: float | None = 0.3
    repeated_spans: int | None = None

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        for find, names in ((find_rules, self.rules), (find_masks, self.masks)):
            try:
                find(names)
            except ValueError as error:
                problems += problems_of(error)
        if self.min_score is not None and not math.isfinite(self.min_score):
            message = f"got {self.min_score}; expected a number, or none"
            problems.append(Problem("min_score", message))
        if bool(self.languages) != (self.language_identifier is not None):
            message = (
                f"got {','.join(self.languages) or 'none'} with language_identifier "
                f"{self.language_identifier}; expected both: tjx-data has no identifier of its "
                "own; give a function of yours as module:function, from a text to (language, "
                "probability), for example of fastText's lid.176"
            )
            problems.append(Problem("languages", message, ("language_identifier",)))
        if not 0 <= self.min_language_score <= 1:
            message = f"got {self.min_language_score}; expected 0 to 1, such as 0.65"
            problems.append(Problem("min_language_score", message))
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            message = f"got {self.near_duplicates}; expected above 0 and at most 1, such as 0.3"
            problems.append(Problem("near_duplicates", message))
        if self.repeated_spans is not None and self.repeated_spans < MIN_BYTES:
            message = f"got {self.repeated_spans}; expected at least {MIN_BYTES} bytes, such as 200"
            problems.append(Problem("repeated_spans", message))
        if problems:
            raise ConfigError(problems)
