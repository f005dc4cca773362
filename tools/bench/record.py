"""A result of a benchmark as JSON: what was measured, when, with which versions, on what."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record(folder: Path, name: str, *, packages: Sequence[str], **content: Any) -> Path:
    """Write ``NAME-DATE.json`` into a folder; return the file.

    Parameters
    ----------
    folder : Path
        As ``tools/bench/results``.
    name : str
        What was measured, and on what.
    packages : sequence of str
        Distributions whose versions matter.
    **content
        The figures, as JSON.
    """
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in packages},
        **content,
    }
    file = folder / f"{name}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file
