"""The compile report in Markdown: a table for each target, a row for each case."""

import re
from typing import Any

GPU_COLUMNS = {
    "registers": "registers",
    "spill_bytes": "spill bytes",
    "stack_bytes": "stack bytes",
    "shared_memory_bytes": "shared memory KiB",
}
TPU_COLUMNS = {
    "vector_memory_bytes": "vector memory KiB",
    "vector_spill_stores": "vector spills",
}
HEAD = """# What the attention kernels use

Made by `tools/kernels/compile_report.py`; do not edit. Compiled, not run: it needs no GPU or TPU.
{date}; {versions}.

Figures stand in the order of the column "kernels". Registers, spills and stack are those of a
thread, shared memory that of a block. A Mosaic GPU kernel starts with the registers given here; its
warpgroups then share them out unequally. Vector spills are writes of a TPU's registers to its
vector memory. Seconds are those of compiling the whole case, on a machine that may do other things.
"""


def table(rows: list[dict[str, Any]], head: dict[str, Any], targets: list[tuple[str, str]]) -> str:
    """Return the report in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    text = HEAD.format(date=head["date"], versions=versions)
    for implementation, target in targets:
        own = {"implementation": implementation, "target": target}
        mine = [row for row in rows if row.items() >= own.items()]
        columns = TPU_COLUMNS if implementation == "tpu" else GPU_COLUMNS
        lines = ["", f"## {implementation}, {target}", ""]
        lines.append(f"| case | kernels | {' | '.join(columns.values())} | seconds |")
        lines.append("|---" * (len(columns) + 3) + "|")
        lines += [_line(row, columns) for row in mine if "refused" not in row]
        refused = [f"- {row['case']}: {row['refused']}" for row in mine if "refused" in row]
        lines += ["", "Refused:", "", *refused] if refused else []
        text += "\n".join(lines) + "\n"
    return text


def _line(row: dict[str, Any], columns: dict[str, str]) -> str:
    if "error" in row:
        return f"| {row['case']} | error: {row['error'].splitlines()[0]} |"
    kernels = row["kernels"]
    cells = [row["case"], " / ".join(_short(kernel["name"]) for kernel in kernels)]
    for key in columns:
        in_kib = key.endswith("memory_bytes")
        values = (round(k[key] / 1024, 1) if in_kib else k[key] for k in kernels)
        cells.append(" / ".join(str(value) for value in values))
    return f"| {' | '.join(cells)} | {row['seconds']} |"


def _short(name: str) -> str:
    return re.sub(r"^.*attention_", "", name).removesuffix("_mosaic_gpu_kernel")
