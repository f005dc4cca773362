"""Run the notebooks of docs/notebooks and store their outputs in them.

`./pants run tools/notebooks.py` runs all, or the given ones. Cells run in this process in
order, without a Jupyter kernel; what a cell prints and the figures of pyplot that it makes are its
outputs. A test runs the notebooks again and compares the outputs.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def run_notebook(path: Path) -> dict[str, Any]:
    """Return a notebook with the outputs of a new run.

    Parameters
    ----------
    path
        An .ipynb file of format 4.

    Returns
    -------
    dict
        The content of the file, with new outputs.
    """
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    mpl.use("Agg")
    from matplotlib import pyplot

    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code_cells, start=1):
        code = compile("".join(cell["source"]), f"<{path.name}, cell {count}>", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)  # noqa: S102  the repository's own notebook
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            lines = text.splitlines(keepends=True)
            outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
        for number in pyplot.get_fignums():
            image = io.BytesIO()
            pyplot.figure(number).savefig(image, format="png", dpi=70, bbox_inches="tight")
            data = {"image/png": base64.b64encode(image.getvalue()).decode()}
            outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
        pyplot.close("all")
        cell |= {"execution_count": count, "outputs": outputs}
    return notebook


def main() -> None:
    """Run the notebooks named on the command line, or all."""
    jax.config.update("jax_num_cpu_devices", 8)  # type: ignore[no-untyped-call]  # as jax is
    for path in [Path(word) for word in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        text = json.dumps(run_notebook(path), indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
