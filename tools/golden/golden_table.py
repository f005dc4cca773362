"""Print how tjx deviates from the golden results of transformers: a row for each model.

It runs the tests of the golden folders, those of the nightly job too, and prints the deviations
that they record, as a Markdown table: the largest difference of the logits (of vision encoders
without a head: of the features), the difference of the loss, the relative difference of the
gradient norm, the number of equal greedy tokens, whether saved files equal those of transformers,
and the root mean square error of bfloat16 logits as a multiple of that of transformers. "-" marks a
column that a model does not have. It exits with 1 if a test fails.

Run it in this repository's environment, from the root:

    python tools/golden/golden_table.py
"""

import collections
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

TESTS = [f"packages/tjx-nn/tests/test_nn_{name}.py" for name in ("golden", "vision_golden", "hf")]
COLUMNS = ["logits", "loss", "gradient norm", "greedy", "round trip", "bfloat16"]


def read_deviations(report: pathlib.Path) -> dict[str, dict[str, str]]:
    """Return the deviations of each model by column from a JUnit report, the largest of several."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for entry in ElementTree.parse(report).iter("property"):  # noqa: S314  written by pytest below
        model, _, column = entry.get("name", "").partition(": ")
        value = entry.get("value", "")
        if column in ("logits", "loss", "gradient norm", "bfloat16") and column in found[model]:
            value = max(value, found[model][column], key=float)
        found[model][column] = value
    return found


def main() -> None:
    """Run the tests and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        report = pathlib.Path(temporary) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS,
            "-k", "transformers", "-m", "slow or not slow",
            "-o", "junit_family=xunit1", f"--junitxml={report}",
        ]  # fmt: skip
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        deviations = read_deviations(report)
    rows = [["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [
        [model, *(found.get(column, "-") for column in COLUMNS)]
        for model, found in sorted(deviations.items())
    ]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    sys.exit(code)


if __name__ == "__main__":
    main()
