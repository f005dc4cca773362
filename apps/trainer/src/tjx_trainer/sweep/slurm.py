"""SLURM job array of a sweep: task i trains run i."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tjx_core import ConfigError
from tjx_trainer.cli.command_line import exit_with_errors
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import Grid, SweepRun

SCRIPT = "array.sbatch"


def write_array(folder: Path, grid: Grid, *, options: str | None, submit: bool) -> int:
    """Write the sbatch script, and submit it if requested.

    Parameters
    ----------
    folder : Path
        The folder of the sweep; all nodes must see it.
    grid : Grid
        The runs.
    options : str or None
        Additional sbatch options, separated by semicolons.
    submit : bool
        Whether to submit the array.

    Returns
    -------
    int
        0, or the exit code of sbatch.

    Raises
    ------
    SystemExit
        With code 2 if sbatch is not installed and `submit` is set.
    """
    script = folder / SCRIPT
    more = [each.strip() for each in (options or "").split(";") if each.strip()]
    script.write_text(array_script(folder.resolve(), grid.combinations, more), encoding="utf-8")
    script.chmod(0o755)
    summary = f"trainer sweep --summary {shlex.quote(str(folder))}"
    if not submit:
        sys.stdout.write(f"sbatch {shlex.quote(str(script))}\nafterwards: {summary}\n")
        return ExitCode.FINISHED
    if shutil.which("sbatch") is None:
        exit_with_errors(ConfigError([
            f"--sweep.submit: sbatch is not installed; submit {script} where it is"
        ]))  # fmt: skip
    code = subprocess.run(["sbatch", str(script)], check=False).returncode
    sys.stdout.write(f"afterwards: {summary}\n")
    return code


def array_script(folder: Path, combinations: Sequence[SweepRun], options: Sequence[str]) -> str:
    """Return the text of the sbatch script."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(combinations)} runs of a sweep, written by `trainer sweep`. Submit it again to",
        "# continue unfinished runs.",
        f"#SBATCH --job-name={folder.name}",
        f"#SBATCH --array=0-{len(combinations) - 1}",
        f"#SBATCH --output={folder}/slurm-%a.log",
        "#SBATCH --open-mode=append",
        # A run saves at SIGTERM, which is sent 90 s before the time limit.
        "#SBATCH --signal=TERM@90",
        *(f"#SBATCH {option}" for option in options),
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *_export_pythonpath(),
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


def _export_pythonpath() -> list[str]:
    """Return the line that exports PYTHONPATH to the jobs, if it is set."""
    if "PYTHONPATH" not in os.environ:
        return []
    return [f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"]
