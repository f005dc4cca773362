"""Worker process that reads fuzz cases under resource limits.

    python tools/campaigns/fuzz_worker.py KIND SEED FOLDER

replies to each line of JSON on standard input ({"number": 7, "skip": []}) with one on standard
output.
"""

import faulthandler
import json
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

from campaigns.fuzz_kind import Kind, judge
from campaigns.fuzz_kinds import KINDS
from campaigns.fuzz_mutations import draws

MEMORY_BYTES = 1 << 30  # memory limit of a case, in addition to that of the program
HANGING_SECONDS = 20.0  # wall time
MOST_CPU_SECONDS = 10.0
MOST_STEPS = 3


def steps_of(seed: int, kind: str, number: int, skip: list[int]) -> list[Random]:
    """Return the random generators of a case's mutations, without skipped ones."""
    count = draws(f"{seed}/{kind}/{number}").choice([1, 1, 1, 2, 2, MOST_STEPS])
    return [draws(f"{seed}/{kind}/{number}/{step}") for step in range(count) if step not in skip]


def read_case(kind: Kind, seed: int, number: int, skip: list[int], folder: Path) -> dict[str, Any]:
    """Write and read a case; return its result."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)
    kind.build(steps_of(seed, kind.name, number, skip), folder)
    began = time.process_time()
    answer: dict[str, Any] = {}
    try:
        answer["verdict"] = judge(kind, folder)
    except BaseException as error:
        answer = {"verdict": "failed", **_describe(error)}
    finally:
        faulthandler.cancel_dump_traceback_later()
    answer["cpu_seconds"] = time.process_time() - began
    answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if answer["verdict"] != "failed" and answer["cpu_seconds"] > MOST_CPU_SECONDS:
        answer |= {"verdict": "failed", "error": "slow", "text": f"{answer['cpu_seconds']:.1f} s"}
    if answer["verdict"] != "failed" and answer["peak_bytes"] > MEMORY_BYTES:
        answer |= {"verdict": "failed", "error": "memory", "text": f"{answer['peak_bytes']} bytes"}
    return answer


def _describe(error: BaseException) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "tjx" in frame.filename or "campaigns" in frame.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    if error.__cause__ is not None and error.__cause__.__traceback__ is not None:
        inner = traceback.extract_tb(error.__cause__.__traceback__)[-1]
        place += f" <- {Path(inner.filename).name}:{inner.name}"
    text = "".join(traceback.format_exception(error, limit=-6))
    return {"error": f"{type(error).__name__} at {place}", "text": text[-6000:]}


def main() -> int:
    """Serve requests until standard input ends."""
    name, seed, scratch = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with replies
    faulthandler.enable()
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    kind = KINDS[name]()
    kind.prepare(scratch)
    sound = scratch / "sound"
    sound.mkdir(exist_ok=True)
    kind.build([], sound)
    kind.check(sound)  # valid input must be accepted, else results mean nothing
    out.write("ready\n")
    _limit()
    for line in sys.stdin:
        question = json.loads(line)
        answer = read_case(kind, seed, question["number"], question["skip"], scratch / "case")
        out.write(json.dumps(answer) + "\n")
    return 0


def _limit() -> None:
    """Limit memory and disable core dumps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
