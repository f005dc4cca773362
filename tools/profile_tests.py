"""Print a table of the time of each test file in seconds, most CPU time first.

    mkdir /tmp/times; TJX_TEST_TIMES=/tmp/times ./pants test --force ::
    python tools/profile_tests.py /tmp/times

`conftest.py` writes one line per test if `TJX_TEST_TIMES` names a folder. CPU seconds are those of
the pytest process; those of the child processes that it waited for stand beside them. ``start`` is
the start of the pytest processes: imports and collection.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

COLUMNS = ("wall", "cpu", "children", "trace", "lower", "compile")


def seconds_by_file(folder: Path) -> dict[str, Counter[str]]:
    """Return the sums of each test file, and its number of tests as ``tests``."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            times = json.loads(line)
            files[times.pop("test").partition("::")[0]].update({"tests": 1, **times})
    return files


def table(files: dict[str, Counter[str]]) -> str:
    """Return a Markdown table, a row for each file and one for their sum."""
    rows = sorted(files.items(), key=lambda row: -row[1]["cpu"] - row[1]["children"])
    rows.append(("all", sum(files.values(), Counter())))
    head = ["file", "tests", *COLUMNS]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    for name, sums in rows:
        cells = [name, str(sums["tests"]), *(f"{sums[column]:.1f}" for column in COLUMNS)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder that TJX_TEST_TIMES named")
    folder = parser.parse_args().folder
    files = seconds_by_file(folder)
    if not files:
        parser.error(
            f"folder: got {folder}, which has no *.jsonl; run the tests with TJX_TEST_TIMES"
        )
    print(table(files))


if __name__ == "__main__":
    main()
