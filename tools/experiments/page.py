"""Pages of experiments: claims that are computed, and the text around them.

A page is made from the results alone, as they stand in the JSON beside it: no figure in it is typed
by hand, and a claim that a run does not bear out is printed as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.runs import Json


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that the results bear out or do not.

    Attributes
    ----------
    text : str
        What is claimed, so that it can be wrong.
    holds : bool
        Whether it is so in these results.
    figures : str
        The numbers that decided it.
    """

    text: str
    holds: bool
    figures: str

    def line(self) -> str:
        """Return the claim as an item of a list.

        Examples
        --------
        >>> Claim(text="Two is less than one.", holds=2 < 1, figures="2 against 1").line()
        '- Two is less than one. **Does not hold in this run**: 2 against 1.'
        """
        verdict = "Holds" if self.holds else "Does not hold in this run"
        return f"- {self.text} **{verdict}**: {self.figures}."


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a reader is told of an experiment.

    Attributes
    ----------
    title, question : str
        What it is about, and what was asked.
    setup : str
        What was run: model, text, budget.
    columns : sequence of str
        Heads of the table; all but the first column are right-aligned.
    rows : sequence of sequences of str
        The table.
    table_note : str
        What the table's numbers are.
    picture : str
        What is to be seen in the picture.
    claims : sequence of Claim
        What came out.
    conclusions : sequence of str
        What the reader may conclude.
    limits : sequence of str
        Where the sizes here are too small to conclude.
    """

    title: str
    question: str
    setup: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    table_note: str
    picture: str
    claims: Sequence[Claim]
    conclusions: Sequence[str]
    limits: Sequence[str]


def to_markdown(page: Page, name: str, about: Json) -> str:
    """Return the page's text.

    Parameters
    ----------
    page : Page
        The content.
    name : str
        Of the experiment: its program, picture and results are called so.
    about : dict
        Of the run: command, date, machine, versions, seconds.

    Returns
    -------
    str
        Markdown.
    """
    parts = [
        f"# {page.title}",
        page.question,
        "## What was run",
        page.setup,
        f"    {about['command']}",
        "## What came out",
        table(page.columns, page.rows),
        page.table_note,
        f"![{page.picture}]({name}.png)",
        f"*{page.picture}*",
        "## Claims",
        "Each is computed from the results of this run.",
        "\n".join(claim.line() for claim in page.claims),
        "## What the reader may conclude",
        "\n".join(f"- {line}" for line in page.conclusions),
        "## Where the sizes here are too small",
        "\n".join(f"- {line}" for line in page.limits),
        "## This run",
        f"{about['date']}, {about['seconds'] / 60:.1f} minutes on {about['machine']}; "
        f"{about['versions']}. All figures stand in [{name}.json]({name}.json); "
        f"`--redraw` makes page and picture from it again.",
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Examples
    --------
    >>> print(table(["arm", "loss"], [["one", "2.0"]]))
    | arm | loss |
    |---|---:|
    | one | 2.0 |
    """
    assert all(len(row) == len(columns) for row in rows), "a row lacks a cell"
    rule = "|---" + "|---:" * (len(columns) - 1) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])
