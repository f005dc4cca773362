"""Benchmark results as JSON, with date, versions and machine."""

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
        Output folder, such as ``tools/bench/results``.
    name : str
        Name of the benchmark and the device.
    packages : sequence of str
        Distributions whose versions are recorded.
    **content
        Results, serializable as JSON.
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
