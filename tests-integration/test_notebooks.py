"""The notebooks run, and print what their files store."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from notebooks import run_notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def outputs(notebook: dict[str, Any]) -> list[str]:
    """Return the texts that cells print, and "image" for figures."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "run tools/notebooks.py"
    return [
        "".join(output.get("text", "image"))
        for cell in cells
        for output in cell["outputs"]
        if "varies" not in cell["metadata"].get("tags", ())
    ]


def compare(stored: list[str], new: list[str]) -> None:
    """Compare texts, and the numbers in them within 15 % or 0.05."""
    assert [NUMBER.sub("#", text) for text in new] == [NUMBER.sub("#", text) for text in stored]
    numbers = [[float(n) for n in NUMBER.findall("\n".join(texts))] for texts in (new, stored)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.15, abs=0.05)


def test_differences_are_found() -> None:
    compare(["loss 5.53 -> 2.45", "image"], ["loss 5.50 -> 2.50", "image"])
    for wrong in (["loss 5.53 -> 3.45", "image"], ["lost 5.53 -> 2.45", "image"], ["loss 5.53"]):
        with pytest.raises(AssertionError):
            compare(["loss 5.53 -> 2.45", "image"], wrong)


def test_notebooks_are_listed() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"notebooks/(\w+)\.ipynb", page)) == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_prints_what_it_stores(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    with jax.transfer_guard("allow"), jax.numpy_rank_promotion("allow"):
        new = run_notebook(path)
    compare(outputs(stored), outputs(new))
