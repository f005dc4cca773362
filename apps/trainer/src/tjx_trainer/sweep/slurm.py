"""A sweep as an array of SLURM jobs: task i makes run i."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.config.run_config import ConfigError
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import Grid, SweepRun

SCRIPT = "array.sbatch"


def write_array(folder: Path, grid: Grid, *, options: str | None, submit: bool) -> int:
    """Write the file for sbatch, and submit it where that is asked for.

    Parameters
    ----------
    folder : Path
        The sweep's, which all nodes must see.
    grid : Grid
        The runs.
    options : str or None
        More options for sbatch, separated by semicolons.
    submit : bool
        Whether the array is submitted.

    Returns
    -------
    int
        0, or sbatch's exit code.

    Raises
    ------
    SystemExit
        With code 2 where there is no sbatch to submit with.
    """
    script = folder / SCRIPT
    more = [each.strip() for each in (options or "").split(";") if each.strip()]
    script.write_text(array_script(folder.resolve(), grid.combinations, more), encoding="utf-8")
    script.chmod(0o755)
    summary = f"trainer sweep --summary {shlex.quote(str(folder))}"
    if not submit:
        sys.stdout.write(f"sbatch {shlex.quote(str(script))}\nand in the end: {summary}\n")
        return ExitCode.FINISHED
    if shutil.which("sbatch") is None:
        exit_with_errors(ConfigError([
            f"--sweep.submit: there is no sbatch here; submit {script} where there is one"
        ]))  # fmt: skip
    code = subprocess.run(["sbatch", str(script)], check=False).returncode
    sys.stdout.write(f"in the end: {summary}\n")
    return code


def array_script(folder: Path, combinations: Sequence[SweepRun], options: Sequence[str]) -> str:
    """Return the text of the file: what sbatch is told, and a line for each run."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(combinations)} runs of a sweep, written by `trainer sweep`. The same file again",
        "# goes on with what is not finished.",
        f"#SBATCH --job-name={folder.name}",
        f"#SBATCH --array=0-{len(combinations) - 1}",
        f"#SBATCH --output={folder}/slurm-%a.log",
        "#SBATCH --open-mode=append",
        # Asked to stop before its time is over, a run saves.
        "#SBATCH --signal=TERM@90",
        *(f"#SBATCH {option}" for option in options),
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *_ways_to_modules(),
        'case "${SLURM_ARRAY_TASK_ID:?start this by sbatch}" in',
    ]
    for number, each in enumerate(combinations):
        words = [*each.words, f"--run_dir={folder / each.name}"]
        lines.append(f"  {number}) set -- {shlex.join(words)} ;;")
    program = shlex.join([sys.executable, "-m", "tjx_trainer.main"])
    lines += [
        '  *) echo "there is no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
        "esac",
        f'exec srun {program} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _ways_to_modules() -> list[str]:
    """Return the line that lets the jobs find what this program was made of, where it needs one."""
    if "PYTHONPATH" not in os.environ:
        return []
    return [f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"]
