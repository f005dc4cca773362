"""Compile every attention kernel ahead of time and report its registers, spills and memory.

`python tools/kernels/compile_report.py` writes compile_report.json and compile_report.md beside
this file, and fails if a kernel does not compile or spills registers. `--check` compares with the
report there and writes nothing; `--only` replaces the rows of some targets; `--lower` stops before
the compilers. Without `--lower`, the packages of tools/locks/compile.txt are required.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from compile_table import table

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "packages" / "tjx-kernels" / "src"
REPORT = HERE / "compile_report.json"
TABLE = HERE / "compile_report.md"

TARGETS = [
    ("mosaic_gpu", "sm_90a"),
    ("triton", "sm_80"),
    ("triton", "sm_90a"),
    ("tpu", "v5e"),
    ("tpu", "v6e"),
]
MINUTES = 40  # time limit per target, sufficient on a loaded machine


def wheel_folder(package: str, inner: str, needed: str) -> Path:
    """Return the folder `inner` of an installed wheel."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / inner / needed).exists():
            return Path(place) / inner
    sys.exit(f"{needed} is not installed: pip install -r tools/locks/compile.txt")


def environment(implementation: str, folder: Path, *, lower: bool = False) -> dict[str, str]:
    """Return an environment with verbose compilers; with `lower` no compiler runs."""
    dumps = folder / "dumps"
    own = {"PYTHONPATH": str(SOURCES), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    if lower:
        return {**os.environ, **own}
    if implementation == "tpu":
        own |= {
            "TPU_LIBRARY_PATH": str(wheel_folder("libtpu", "", "libtpu.so") / "libtpu.so"),
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles",
        }
    else:
        cuda = wheel_folder("nvidia", "cu13", "bin/ptxas")
        own |= {
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda} --xla_dump_to={dumps} "
            "--xla_gpu_ptx_compiler_extra_flags=-v",
            # XLA logs what ptxas prints; Mosaic GPU has a variable of its own.
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "subprocess_compilation=3",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
    return {**os.environ, **own}


def compile_target(
    implementation: str, target: str, *, case: str | None = None, lower: bool = False
) -> dict[str, Any]:
    """Compile (or only `lower`) all cases, or one, for one target in a subprocess."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dumps").mkdir()
        command = [sys.executable, str(HERE / "compile_target.py"), implementation, target, name]
        command += ["--case", case] if case else []
        command += ["--lower"] if lower else []
        variables = environment(implementation, folder, lower=lower)
        try:
            code = str(subprocess.run(command, env=variables, timeout=60 * MINUTES).returncode)
        except subprocess.TimeoutExpired:
            code = f"none after {MINUTES} minutes"
        if (folder / "report.json").is_file():
            report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        else:
            output = folder / "output.txt"
            print(output.read_text()[-3000:] if output.is_file() else "(no output)")
            row = {"implementation": implementation, "target": target, "case": "all"}
            report = {"rows": [{**row, "error": f"the process ended with {code}"}], "versions": {}}
    print(summary(implementation, target, report["rows"]), flush=True)
    return report


def summary(implementation: str, target: str, rows: list[dict[str, Any]]) -> str:
    """Summarize the cases of a target in one line."""
    kernels = [kernel for row in rows for kernel in row.get("kernels", [])]
    counts = [f"{len(kernels)} kernels of {sum('kernels' in row for row in rows)} cases compiled"]
    if lowered := [row["lowered"] for row in rows if "lowered" in row]:
        counts = [f"{sum(lowered)} kernels of {len(lowered)} cases lowered"]
    counts.append(f"{sum('refused' in row for row in rows)} cases refused")
    if failures := problems(rows):
        counts.append(f"{len(failures)} PROBLEMS")
    if registers := [kernel["registers"] for kernel in kernels if "registers" in kernel]:
        counts.append(f"at most {max(registers)} registers")
    counts.append(f"{sum(row.get('seconds', 0) for row in rows):.0f} s")
    return f"{implementation} {target}: " + ", ".join(counts)


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each failure and each kernel with spilled registers or serialized products.

    Vector spills of a TPU are not a problem: blocks larger than the register file are stored in
    vector memory.
    """
    found = []
    for row in rows:
        where = f"{row['implementation']} {row['target']} {row['case']}"
        if "error" in row:
            found.append(f"{where}: {row['error'].splitlines()[0]}")
        found += [
            f"{where}: {kernel['name']} spills {kernel['spill_bytes']} bytes"
            for kernel in row.get("kernels", [])
            if kernel.get("spill_bytes")
        ]
        found += [
            f"{where}: {kernel['name']} has too few registers for overlapping products"
            for kernel in row.get("kernels", [])
            if kernel.get("serialized")
        ]
    return found


def differences(rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """Return a line for each case that differs from the stored report."""

    def indexed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            f"{row['implementation']} {row['target']} {row['case']}": (
                row.get("refused"),
                row.get("kernels"),
            )
            for row in rows
        }

    now, before = indexed(rows), indexed(committed)
    return [f"{key}: now {now[key]}, in the report {before.get(key)}"
            for key in now if now[key] != before.get(key)]  # fmt: skip


def merged(new: dict[str, Any], committed: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the targets of `new` replaced, in the order of `TARGETS`.

    Raises
    ------
    ValueError
        If the other targets' rows were made with other versions of the compilers.
    """
    before = committed["versions"]
    other = {name: number for name, number in new["versions"].items() if before[name] != number}
    if other:
        raise ValueError(
            f"--only: got compilers {other}; expected those of the report, {before}; leave out "
            "--only to compile every target"
        )

    def target_of(row: dict[str, Any]) -> tuple[str, str]:
        return row["implementation"], row["target"]

    made = {target_of(row) for row in new["rows"]}
    kept = [row for row in committed["rows"] if target_of(row) not in made]
    rows = sorted([*new["rows"], *kept], key=lambda row: TARGETS.index(target_of(row)))
    return {"date": new["date"], "versions": before, "rows": rows}


def write(report: dict[str, Any]) -> None:
    """Write a report as JSON and as tables."""
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    TABLE.write_text(table(report["rows"], report, TARGETS))


def main() -> None:
    """Parse the command line, compile, and write or check the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="an implementation, a target, or both as triton:sm_80; replaces its rows",
    )
    parser.add_argument("--check", action="store_true", help="compare with the report; write none")
    parser.add_argument(
        "--case", metavar="NAME", help="one case of compile_cases.py; writes no report"
    )
    parser.add_argument(
        "--lower",
        action="store_true",
        help="lower the kernels and stop before the compilers, which need not be installed",
    )
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at a time")
    arguments = parser.parse_args()
    chosen = [
        pair for pair in TARGETS
        if not arguments.only or {*pair, ":".join(pair)} & set(arguments.only)
    ]  # fmt: skip
    if not chosen:
        parser.error(f"--only must be of {', '.join(':'.join(pair) for pair in TARGETS)}")
    if arguments.check and arguments.lower:
        parser.error(
            "--lower: got --check; expected one of them, as lowering gives no compiler figures"
        )
    compile_one = partial(compile_target, case=arguments.case, lower=arguments.lower)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        reports = list(pool.map(compile_one, *zip(*chosen, strict=True)))
    rows = [row for report in reports for row in report["rows"]]
    failures = problems(rows)
    if arguments.check:
        failures += differences(rows, json.loads(REPORT.read_text())["rows"])
    elif not (arguments.case or arguments.lower):
        versions = {k: v for report in reports for k, v in sorted(report["versions"].items())}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        new = {"date": date, "versions": dict(sorted(versions.items())), "rows": rows}
        write(merged(new, json.loads(REPORT.read_text())) if arguments.only else new)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
