"""Check correctness and measure speed on a GPU, in four slices of at most 9 minutes each.

    python tools/bench/gpu.py --download-wheels .wheels
    python tools/bench/gpu.py --slice 1 --wheels .wheels --output DIR
    python tools/bench/gpu.py --slice 4 --wheels .wheels --output DIR --previous FILE [FILE ...]
    python tools/bench/gpu.py --rehearse --output DIR

slice 1  (at most 5 minutes) every attention implementation against float64, forward and backward,
         twice; 20 steps of the trainer
slice 2  (9 minutes) the other tests of the kernels; the trainer by attention implementation, its
         layers scanned and unrolled; the attention benchmark against JAX and torch
slice 3  (9 minutes) batch sizes, XLA flags, chunk sizes of the head loss; GPT-2 with torch.compile
slice 4  (9 minutes) repeats of the fastest run, bitwise-equal resume, block sizes

Slices 3 and 4 take the fastest run of the results given by --previous, else the trainer's defaults.
--rehearse runs all slices, or the one given by --slice, on the CPU with tiny shapes.

The first command needs the network: run it on your machine and copy the folder to the GPU machine,
where --wheels installs the packages into a separate folder. The interpreter there needs
jax[cuda13], flax, optax and pytest; missing or outdated packages are reported first.

Each slice writes three files into DIR: slice-N.jsonl with a line per completed case;
gpu-slice-N-DATE.json with the same cases, versions, machine and date, to commit in
tools/bench/results/; slice-N.tar.gz with the logs. The exit status is 0 if no case failed.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType

from gpu_slices import requirements
from gpu_slices.plan import LIMITS, Plan, fastest
from gpu_slices.programs import Machine
from gpu_slices.runner import Recorder, failures, run_stage, stop_all
from gpu_slices.sizes import CPU, GPU, Sizes
from record import record
from turns import Json, machine

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 15.0  # seconds reserved for the archive at the end of a slice
LARGEST_LOG = 2**19  # bytes kept of each log
# Distributions whose versions are recorded if installed.
VERSIONS = (
    "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax", "numpy", "torch",
    "triton",
)  # fmt: skip


def prepare_environment(*, rehearse: bool, site: Path | None) -> None:
    """Set the variables that all processes of the slices inherit."""
    folders = [*ROOT.glob("packages/*/src"), ROOT / "apps" / "trainer" / "src"]
    folders += [ROOT / "packages" / "tjx-kernels" / "tests", ROOT / "tools" / "bench"]
    before = os.environ.get("PYTHONPATH")
    paths = [*([site] if site else []), *folders, *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    os.environ["PYTHONUNBUFFERED"] = "1"
    if rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # In a dry run, compilation takes longer than execution.
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    if site is not None:
        sys.path.insert(0, str(site))  # so that importlib.metadata finds them


def probe(sizes: Sizes, torch_python: Path | None) -> tuple[Machine, Json]:
    """Query the hardware and software of this machine in a subprocess with JAX.

    Raises
    ------
    SystemExit
        If JAX is unusable, or finds no GPU outside a rehearsal.
    """
    command = [sys.executable, "-m", "gpu_slices.probe"]
    seconds = 60 * sizes.patience
    answer = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    if answer.returncode:
        sys.exit(f"JAX cannot be used:\n{answer.stderr[-2000:]}")
    found: Json = json.loads(answer.stdout.splitlines()[-1])
    if not sizes.tiny and found["backend"] != "gpu":
        sys.exit(f"JAX sees no GPU, but {found['device']}; --rehearse runs on a CPU")
    torch = torch_python or (Path(sys.executable) if importlib.util.find_spec("torch") else None)
    cores = os.cpu_count() or 1
    here = Machine(
        implementations=found["implementations"],
        trainer_flags=found.pop("trainer_flags"),
        peak_flops=found["peak_flops"],
        torch_python=None if torch is None else str(torch),
        # Fewer than one per core: XLA compiles with several threads, and the first programs must
        # finish early.
        processes=max(2, 3 * cores // 8),
    )
    return here, found


def run_slice(
    number: int,
    sizes: Sizes,
    *,
    here: Machine,
    about: Json,
    given: argparse.Namespace,
    start: float,
) -> list[Json]:
    """Run one slice and write its files; return its cases.

    Parameters
    ----------
    number : int
        1 to 4.
    sizes : Sizes
        Sizes for a GPU or for a rehearsal.
    here : Machine
        Hardware and software of the machine.
    about : dict
        Output of the probe, to be recorded.
    given : argparse.Namespace
        Parsed command line.
    start : float
        Time by `time.monotonic` at which the slice began.
    """
    before = cpu_seconds()
    output, folder = given.output, given.work / f"slice-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    logs, keep = folder / "keep" / "logs", folder / "keep"
    logs.mkdir(parents=True)
    winner = fastest(given.previous) if given.previous and number > 2 else None
    plan = Plan(sizes, here, work=given.work, keep=keep, winner=winner)
    recorder = Recorder(output / f"slice-{number}.jsonl")
    deadline = start + LIMITS[number] * sizes.patience - RESERVE
    print(f"slice {number}: {about['device']}, winner {winner or 'not given'}", flush=True)
    for stage in plan.slice(number):
        run_stage(stage, root=ROOT, logs=logs, recorder=recorder, deadline=deadline)
    recorder.close()
    archive(keep, output / f"slice-{number}")
    seconds = round(time.monotonic() - start, 1)
    processors = round(cpu_seconds() - before, 1)
    name = f"{'rehearsal' if sizes.tiny else 'gpu'}-slice-{number}"
    record(
        output,
        name,
        packages=[package for package in VERSIONS if _is_installed(package)],
        slice=number,
        seconds=seconds,
        cpu_seconds=processors,
        environment={**machine(), **about},
        cases=recorder.cases,
    )
    print_summary(number, recorder.cases)
    print(f"slice {number} took {seconds} s, {processors} s of processor time", flush=True)
    return recorder.cases


def archive(folder: Path, target: Path) -> None:
    """Archive logs and small files; long files are truncated to their end."""
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > LARGEST_LOG:
            file.write_bytes(file.read_bytes()[-LARGEST_LOG:])
    shutil.make_archive(str(target), "gztar", root_dir=folder)


def cpu_seconds() -> float:
    """Return the CPU time of child processes that have exited."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_summary(number: int, cases: Sequence[Json]) -> None:
    """Print the speeds and the failures of a slice."""
    print(f"\n== slice {number}: {len(cases)} cases")
    for case in cases:
        if case.get("tokens_per_sec") is not None:
            mfu = "" if case["mfu"] is None else f", MFU {case['mfu']:.1%}"
            peak = (case["device_peak_bytes"] or 0) / 2**30
            print(
                f"{case['case']:<28}{case['tokens_per_sec']:>12,.0f} tokens/s{mfu}, median step "
                f"{case['step_time']['p50_ms']} ms, p99 {case['step_time']['p99_ms']} ms, "
                f"{peak:.1f} GiB"
            )
    counts = dict.fromkeys(("ok", "failed", "skipped"), 0)
    for case in cases:
        counts[case["status"]] += 1
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    for line in failures(cases):
        print(f"FAILED  {line}")


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def stop(number: int, _frame: FrameType | None) -> None:
    """Handle a signal: kill all processes of the slice and exit; recorded cases are kept."""
    stop_all()
    os._exit(128 + number)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice", type=int, choices=sorted(LIMITS))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny shapes")
    parser.add_argument("--download-wheels", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels to install")
    parser.add_argument("--previous", type=Path, nargs="+", default=[], help="results of slices")
    parser.add_argument("--torch-python", type=Path, help="Python interpreter with torch")
    parser.add_argument(
        "--work", type=Path, help="folder for data, compiled programs and runs; ~/.cache/tjx/gpu"
    )
    given = parser.parse_args()
    if given.download_wheels is None:
        if given.slice is None and not given.rehearse:
            parser.error("give --slice N, --rehearse or --download-wheels FOLDER")
        if given.output is None:
            parser.error("--output: got none; expected a folder for the results")
    return given


def main() -> None:
    """Parse the command line and run the slices."""
    start = time.monotonic()
    given = arguments()
    if given.download_wheels is not None:
        requirements.download(ROOT, given.download_wheels)
        return
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, stop)
    sizes = CPU if given.rehearse else GPU
    with tempfile.TemporaryDirectory() as scratch:
        # A rehearsal uses a temporary folder; slices on one machine share the compilation cache.
        shared = Path.home() / ".cache" / "tjx" / "gpu"
        given.work = given.work or (Path(scratch) / "work" if given.rehearse else shared)
        given.work = given.work.resolve()
        given.output = given.output.resolve()
        for folder in (given.work, given.output):
            folder.mkdir(parents=True, exist_ok=True)
        site = None
        if given.wheels is not None:
            site = Path(scratch) / "site"
            requirements.install(given.wheels, site)
        prepare_environment(rehearse=given.rehearse, site=site)
        disk = 2**30 if given.rehearse else requirements.DISK
        if problems := requirements.check(ROOT, given.work, disk=disk):
            wheels = "python tools/bench/gpu.py --download-wheels .wheels, then --wheels .wheels"
            sys.exit("\n".join([*problems, f"wheels that can be carried: {wheels}"]))
        here, about = probe(sizes, given.torch_python)
        cases: list[Json] = []
        for number in [given.slice] if given.slice else sorted(LIMITS):
            cases += run_slice(number, sizes, here=here, about=about, given=given, start=start)
            start = time.monotonic()
    sys.exit(any(case["status"] == "failed" for case in cases))


if __name__ == "__main__":
    main()
