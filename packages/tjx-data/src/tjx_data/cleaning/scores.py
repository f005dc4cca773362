"""Scores of documents, such as those of a quality classifier, in a column of their records."""

import math


def scored_text(text_field: str, column: str) -> str:
    r"""Return the template of records whose text begins with a line of a score.

    Parameters
    ----------
    text_field : str
        Field of the text, or a template of several.
    column : str
        Field of the score.

    Returns
    -------
    str
        The template, for the field of the text of a corpus.

    Examples
    --------
    >>> scored_text("text", "quality")
    '{quality}\\n{text}'
    """
    is_template = "{" in text_field or "}" in text_field
    return f"{{{column}}}\\n{text_field if is_template else f'{{{text_field}}}'}"


def split_score(document: str) -> tuple[float, str]:
    r"""Return the score and the text of a document that begins with a line of its score.

    Parameters
    ----------
    document : str
        The document.

    Returns
    -------
    float, str
        NaN and the whole document if the line is no number.

    Examples
    --------
    >>> split_score("0.25\nA text.")
    (0.25, 'A text.')
    """
    line, newline, text = document.partition("\n")
    try:
        score = float(line)
    except ValueError:
        return math.nan, document
    return (score, text) if newline else (math.nan, document)
