"""Markdown pages of experiments: text, a table, and claims evaluated on the results.

A page is generated from the results JSON alone, so no figure is typed by hand. A claim that the
results do not support is printed as not holding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.runs import Json


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that the results support or contradict.

    Attributes
    ----------
    text : str
        Falsifiable statement.
    holds : bool
        Whether the results support it.
    figures : str
        The numbers that decide it.
    """

    text: str
    holds: bool
    figures: str

    def line(self) -> str:
        """Return the claim as a Markdown list item.

        Examples
        --------
        >>> Claim(text="Two is less than one.", holds=2 < 1, figures="2 against 1").line()
        '- Two is less than one. **Does not hold in this run**: 2 against 1.'
        """
        verdict = "Holds" if self.holds else "Does not hold in this run"
        return f"- {self.text} **{verdict}**: {self.figures}."


@dataclass(frozen=True, kw_only=True)
class Page:
    """Content of the page of an experiment.

    Attributes
    ----------
    title, question : str
        Heading, and the question that the experiment answers.
    setup : str
        Model, data and training budget.
    columns : sequence of str
        Header cells of the table; all but the first column are right-aligned.
    rows : sequence of sequences of str
        Body of the table.
    table_note : str
        Units and statistics of the table.
    picture : str
        Caption of the figure.
    claims : sequence of Claim
        Claims evaluated on the results.
    conclusions : sequence of str
        Conclusions.
    limits : sequence of str
        Limitations of the experiment.
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
    """Render a page as Markdown.

    Parameters
    ----------
    page : Page
        The content.
    name : str
        Name of the experiment: the stem of its program, figure and results.
    about : dict
        Metadata of the run: command, date, machine, versions, seconds.

    Returns
    -------
    str
        Markdown.
    """
    parts = [
        f"# {page.title}",
        page.question,
        "## Setup",
        page.setup,
        f"    {about['command']}",
        "## Results",
        table(page.columns, page.rows),
        page.table_note,
        f"![{page.picture}]({name}.png)",
        f"*{page.picture}*",
        "## Claims",
        "Each claim is evaluated on the results of this run.",
        "\n".join(claim.line() for claim in page.claims),
        "## Conclusions",
        "\n".join(f"- {line}" for line in page.conclusions),
        "## Limitations",
        "\n".join(f"- {line}" for line in page.limits),
        "## Run details",
        f"{about['date']}, {about['seconds'] / 60:.1f} minutes on {about['machine']}; "
        f"{about['versions']}. The results are in [{name}.json]({name}.json); "
        f"`--redraw` regenerates the page and the figure from them.",
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table.

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
