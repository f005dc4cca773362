"""Compile report: parsing of compiler output, and completeness of the committed report."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_cases import cases
from compile_report import REPORT, TABLE, TARGETS, differences, merged, problems
from compile_table import table
from compile_target import description
from compiler_output import read_ptxas, read_thunks, read_tpu

PTXAS = """
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'dkv_attention' for 'sm_80'
ptxas info    : Function properties for dkv_attention
    96 bytes stack frame, 92 bytes spill stores, 88 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size, 1 bytes smem
"""


def test_figures_of_ptxas() -> None:
    assert read_ptxas(PTXAS, "sm_80")["dkv_attention"] == {
        "name": "dkv_attention",
        "registers": 255,
        "spill_bytes": 180,
        "stack_bytes": 96,
        "shared_memory_bytes": 1,
    }
    with pytest.raises(ValueError, match="other"):
        read_ptxas(PTXAS, "sm_90a")


def test_shared_memory_of_the_kernels_of_a_program(tmp_path: Path) -> None:
    line = "002: kCustomKernel [prev=001 (1) | sink] dq grid: [1, 8, 2] threads: [128, 1, 1]"
    (tmp_path / "m.thunk_sequence.txt").write_text(f"{line}  shared_memory: 49152 bytes\n")
    assert read_thunks(tmp_path) == {"dq": 49152}


def test_figures_of_a_tpu_program(tmp_path: Path) -> None:
    program = (
        '%dq.1 = f32[8,128] custom-call(%a), custom_call_target="tpu_custom_call", backend_config='
        '{"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}'
    )
    with pytest.raises(ValueError, match=r"dq\.1"):
        read_tpu(program, tmp_path)
    spill = "{ %1 = vst [vmem:[#allocation2_spill] sm:$0xff] %v1 ;; %2 = vst [vmem:[%s2]] %v1 }"
    (tmp_path / "17-dq.1-01-final_bundles.txt").write_text(spill)
    expected = {"name": "dq", "vector_memory_bytes": 4096, "vector_spill_stores": 1}
    assert read_tpu(program, tmp_path) == [expected]


def test_spills_errors_and_changed_figures_are_problems() -> None:
    name = {"implementation": "triton", "target": "sm_80"}
    good = {**name, "case": "a", "kernels": [{"name": "dq", "registers": 9, "spill_bytes": 0}]}
    spilled = {**name, "case": "b", "kernels": [{"name": "dq", "registers": 9, "spill_bytes": 4}]}
    failed = {**name, "case": "c", "error": "no\nreason"}
    assert problems([good]) == []
    assert len(problems([good, spilled, failed])) == 2
    assert differences([good], [good]) == []
    assert len(differences([good], [{**good, "kernels": []}])) == 1
    assert len(differences([good], [])) == 1


def test_rows_of_one_target_are_replaced_in_place() -> None:
    def row(target: tuple[str, str], case: str) -> dict[str, str]:
        return {"implementation": target[0], "target": target[1], "case": case}

    first, second, third = TARGETS[:3]
    versions = {"jax": "1", "libtpu": "2"}
    old = {"date": "a", "versions": versions, "rows": [row(x, "old") for x in TARGETS[:3]]}
    new = {"date": "b", "versions": {"jax": "1"}, "rows": [row(second, "new"), row(second, "more")]}
    rows = [row(first, "old"), *new["rows"], row(third, "old")]
    assert merged(new, old) == {"date": "b", "versions": versions, "rows": rows}
    with pytest.raises(ValueError, match=r"--only: got compilers \{.jax.: .3.\}; expected those"):
        merged({**new, "versions": {"jax": "3"}}, old)


def test_committed_report_is_complete() -> None:
    text = REPORT.read_text()
    report = json.loads(text)
    rows = report["rows"]
    assert problems(rows) == []
    for target in TARGETS:
        mine = [row for row in rows if (row["implementation"], row["target"]) == target]
        assert [row["case"] for row in mine] == [case.name for case in cases()]
        assert any("kernels" in row for row in mine)
    assert table(rows, report, TARGETS) == TABLE.read_text()
    assert "/site-packages" not in text
    assert "/home" not in text


# --- the command ----------------------------------------------------------------------------------


def run_report(*arguments: str) -> str:
    """Run the documented command without PYTHONPATH and return its output."""
    script = Path(problems.__code__.co_filename)
    command = [sys.executable, str(script), "--case", "D64 full", *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kernel_for_gpu_and_tpu_is_lowered_by_the_command() -> None:
    """Cover imports, paths and arguments up to the compilers, which CI does not install."""
    targets = ["triton:sm_80", "tpu:v5e"]  # fast targets
    said = run_report("--lower", *(word for target in targets for word in ("--only", target)))
    for target in targets:
        assert f"{target.replace(':', ' ')}: 3 kernels of 1 cases lowered" in said


def test_every_gpu_has_a_description() -> None:
    for implementation, target in TARGETS:
        if implementation != "tpu":
            digits = target.removeprefix("sm_").removesuffix("a")
            capability = f"major: {digits[:-1]} minor: {digits[-1]}"
            assert f"{{ {capability} }}" in description(target)


COMPILERS = ("libtpu", "jax_cuda13_plugin", "nvidia.cu13")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing too
        return False


@pytest.mark.skipif(not all(map(installed, COMPILERS)), reason="compilers are not installed")
def test_a_kernel_is_compiled_for_every_target() -> None:
    said = run_report("--jobs", "1")
    for implementation, target in TARGETS:
        assert f"{implementation} {target}: 3 kernels of 1 cases compiled" in said
