"""Check that a resumed run and a repeated run are bitwise equal to the first run.

    python -m gpu_slices.resume_check --folder WORK --steps 20 [--must-agree] -- FLAGS

FLAGS are flags of the trainer. The first run saves a checkpoint half-way. A copy with only
this checkpoint is resumed, and a second run starts from step 0.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_slices.json_lines import Status, begin, finish
from gpu_slices.trainer_run import TRAINER, read_records


def train(run_dir: Path, flags: Sequence[str], steps: int) -> None:
    """Run the trainer; exit with its status if it fails."""
    saves = [f"--checkpoint.every={steps // 2}", "--checkpoint.keep=2", "--log.every=1"]
    words = [f"--run_dir={run_dir}", f"--train.max_steps={steps}", f"--train.eval_every={steps}"]
    status = subprocess.run([*TRAINER, *flags, *words, *saves], cwd=run_dir.parent).returncode
    if status:
        sys.exit(status)


def state_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """Return the SHA-256 of each array file of a checkpoint, by its name."""
    files = sorted((run_dir / "checkpoints" / str(step)).glob("*.safetensors"))
    assert files, f"{run_dir} holds no checkpoint of step {step}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(first: Path, other: Path, steps: int) -> list[str]:
    """Return the array files that differ after the last step, and the first differing loss."""
    wanted, found = (state_hashes(run, steps) for run in (first, other))
    problems = [name for name in wanted if wanted[name] != found.get(name)]
    losses = {record["step"]: record["train/loss"] for record in read_records(first)}
    for record in read_records(other):
        if record["train/loss"] != losses[record["step"]]:
            return [*problems, f"loss of step {record['step']}"]
    return problems


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20, help="even")
    parser.add_argument("--must-agree", action="store_true", help="fail on a difference")
    parser.add_argument("flags", nargs="+", help="flags of the trainer, after --")
    given = parser.parse_args()
    folder: Path = given.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first, resumed, repeated = (folder / name for name in ("first", "resumed", "repeated"))

    def compare(case: str, other: Path, start: float) -> None:
        problems = differences(first, other, given.steps)
        reason = f"not the same bits: {', '.join(problems)}" if problems else None
        status: Status = "failed" if problems and given.must_agree else "ok"
        seconds = round(time.monotonic() - start, 1)
        finish(case, status, same_bits=not problems, reason=reason, seconds=seconds)

    begin("resumed")
    start = time.monotonic()
    train(first, given.flags, given.steps)
    shutil.copytree(first, resumed)
    shutil.rmtree(resumed / "checkpoints" / str(given.steps))
    train(resumed, given.flags, given.steps)
    compare("resumed", resumed, start)
    begin("repeated")
    start = time.monotonic()
    train(repeated, given.flags, given.steps)
    compare("repeated", repeated, start)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
